"""torchvision's classifiers by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models as tv

from planish.deploy.pixels import to_input
from planish.errors import PlanishError
from planish.models import build, load_model, save_weights, state_hash
from planish.models.torchvision_models import build_torchvision, preprocessing_of, split_name

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_weights_of_a_file_decide_the_head(name, tmp_path):
    torch.manual_seed(0)
    model = tv.get_model(name, num_classes=7).eval()
    save_weights(model, tmp_path / "w.safetensors")
    loaded = load_model(f"torchvision:{name}", weights=tmp_path / "w.safetensors")
    assert loaded.weights_hash == state_hash(model)
    assert loaded.recipe == {"source": "torchvision", "architecture": name, "arguments": {"num_classes": 7}}
    rebuilt = build(json.loads(json.dumps(loaded.recipe))).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(IMAGES), model(IMAGES))
    with pytest.raises(PlanishError, match="does not fit torchvision"):
        load_model(f"torchvision:{name}", weights=tmp_path / "w.safetensors", num_classes=3)


@pytest.fixture
def published(monkeypatch):
    """Downloads give a network with random weights; returns what was asked for."""
    asked = []

    def fetch(url, **options):
        asked.append((url, options))
        torch.manual_seed(0)
        return tv.get_model("googlenet" if "googlenet" in url else "mobilenet_v3_small").state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    return asked


def test_published_weights_are_fetched_when_they_are_named(published):
    loaded = load_model("torchvision:mobilenet_v3_small:DEFAULT")
    ((url, options),) = published
    assert url == tv.MobileNet_V3_Small_Weights.DEFAULT.url
    assert options["weights_only"]
    assert loaded.model.planish_classes[:2] == ("tench", "goldfish")
    torch.manual_seed(0)
    assert loaded.weights_hash == state_hash(tv.get_model("mobilenet_v3_small"))
    smaller = [load_model("torchvision:mobilenet_v3_small:IMAGENET1K_V1", num_classes=5) for _ in range(2)]
    assert smaller[0].weights_hash == smaller[1].weights_hash
    assert smaller[0].model(IMAGES).shape == (2, 5)
    assert not hasattr(smaller[0].model, "planish_classes")
    assert torch.equal(smaller[0].model.features[0][0].weight, loaded.model.features[0][0].weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_for_training_only_are_left_away(published):
    model = load_model("torchvision:googlenet:DEFAULT").model
    assert model.transform_input
    assert model.aux1 is None
    assert model(IMAGES).shape == (2, 1000)


def test_weights_that_do_not_fit_their_network(published):
    with pytest.raises(PlanishError, match="do not fit what torchvision builds"):
        load_model("torchvision:resnet18:DEFAULT")


def test_without_weights_and_without_a_network(tmp_path, monkeypatch):
    for name, words in (
        ("torchvision:resnet18", r"has no weights: give --weights FILE, or torchvision:resnet18:DEFAULT"),
        ("torchvision:resnet_18", r"no classifier 'resnet_18': the closest are .*resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier"),
        ("torchvision:resnet18:BEST", "no weights 'BEST' of resnet18: expected one of IMAGENET1K_V1"),
        ("torchvision:", "is no name of torchvision"), ("torchvision:a:b:c", "is no name of torchvision"),
    ):  # fmt: skip
        with pytest.raises(PlanishError, match=words):
            load_model(name)
    save_weights(tv.get_model("mobilenet_v3_small"), tmp_path / "w")
    with pytest.raises(PlanishError, match="names published weights, and others are given"):
        load_model("torchvision:mobilenet_v3_small:DEFAULT", weights=tmp_path / "w")

    def offline(*_, **__):
        raise OSError("no route\nmore")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(PlanishError, match="could not be fetched: no route; --weights FILE"):
        load_model("torchvision:mobilenet_v3_small:DEFAULT")
    with pytest.raises(PlanishError, match="may not take the argument 'weights'"):
        build_torchvision("resnet18", {"weights": "DEFAULT"})
    assert split_name("torchvision:resnet18") == ("resnet18", None)


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "swin_t", "vit_b_16", "maxvit_t", "inception_v3"])
def test_the_same_pixels_as_torchvision(name):
    transforms = tv.get_model_weights(name).DEFAULT.transforms()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC)
    found = preprocessing_of(transforms)
    theirs = transforms(image).numpy()
    assert theirs.shape == found.input_size
    assert np.abs(to_input(image, found) - theirs).max() < 1e-5
    with pytest.raises(PlanishError, match="are not those of a classifier"):
        preprocessing_of(tv.detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT.transforms())
