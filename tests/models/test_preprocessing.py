"""Preprocessing: what timm's configuration says, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from planish.data.arrays import BatchedTensorDataset
from planish.data.encoded import EncodedImages
from planish.deploy.card import Card, read_card
from planish.deploy.checkpoint import read_head, save
from planish.deploy.pixels import to_input
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
        ({"channel_order": "gbr"}, "expected rgb, or bgr of 3"),
        ({"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "channel_order": "bgr"}, "'bgr' of 1 channels"),
        ({"size": 8}, "unknown entry 'size'"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(PlanishError, match=words):
        preprocessing_from(values)


def test_the_order_of_channels_is_written_only_where_it_is_another():
    assert "channel_order" not in Preprocessing().to_dict()
    other = Preprocessing(channel_order="bgr")
    assert preprocessing_from(other.to_dict()) == other


def test_the_order_of_channels_everywhere(tmp_path):
    """Files, arrays, `planish classify`, checkpoints and cards agree on what BGR is."""
    rgb = Preprocessing((3, 16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0)
    bgr = replace(rgb, mean=rgb.mean[::-1], std=rgb.std[::-1], channel_order="bgr")
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    given = {}
    for name, looks in (("rgb", rgb), ("bgr", bgr)):
        stacked = BatchedTensorDataset(noise.transpose(2, 0, 1)[None], [0], looks)[0][0]
        assert torch.equal(EncodedImages([tmp_path / "a.png"], [0], looks)[0][0], stacked)
        np.testing.assert_allclose(to_input(Image.fromarray(noise), looks), stacked, atol=1e-6)
        given[name] = stacked
        card = Card("m", "float", ("a",), looks, "0")
        assert read_card(card.to_metadata()).preprocessing == looks
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
        (tmp_path / "m.py").write_text(
            "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))"
        )
        save(model, tmp_path / name, recipe=f"{tmp_path}/m.py:build", preprocessing=looks)
        assert read_head(tmp_path / name).preprocessing == looks
    assert torch.equal(given["bgr"], given["rgb"].flip(0))
