"""Preprocessing: what timm's configuration says, and refusals."""

import pytest
import timm
from timm.data import resolve_model_data_config

from planish.errors import PlanishError
from planish.models import Preprocessing, preprocessing_from
from planish.models.preprocessing import timm_preprocessing


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "tf_efficientnet_lite0", "test_resnet"])
def test_timm_models_get_timms_own_configuration(name):
    model = timm.create_model(name)
    expected = resolve_model_data_config(model)
    got = timm_preprocessing(model).to_dict()
    assert got == {key: expected[key] for key in got}


def test_a_model_built_for_other_images_is_met_there():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, in_chans=1)
    got = timm_preprocessing(model)
    assert got.input_size == (1, 32, 32)
    assert got.mean == (0.5,)


def test_round_trip_through_lists():
    one = Preprocessing((1, 28, 28), (0.3,), (0.4,), "bilinear", 1.0)
    assert preprocessing_from({k: list(v) if isinstance(v, tuple) else v for k, v in one.to_dict().items()}) == one


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"input_size": (2, 8, 8)}, "1 or 3 channels"),
        ({"mean": (0.5,)}, "as many values"),
        ({"std": (0.0, 1.0, 1.0)}, "above 0"),
        ({"crop_pct": 1.5}, "fraction"),
        ({"size": 8}, "unknown entry 'size'"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(PlanishError, match=words):
        preprocessing_from(values)
