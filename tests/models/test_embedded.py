"""The embedded networks are worth what their cards say."""

import json

import pytest
import torch

from planish.data import load_data, make_loader
from planish.models import EMBEDDED_MODELS, card, check_classes, load_model
from planish.models.embedded import WEIGHTS

MEASURED = json.loads((WEIGHTS / "cards.json").read_text())


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_top1_on_the_embedded_test_images(name):
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing)
    check_classes(loaded.model, data)
    with torch.no_grad():
        right = sum(
            int((loaded.model(x).argmax(1) == y).sum()) for x, y in make_loader(data.test, 250, shuffle=False, seed=0)
        )
    assert abs(right / 2000 - MEASURED[name]["top1_2000"]) <= 0.0011  # two images may tip with another kernel
    assert loaded.weights_hash == MEASURED[name]["weights_hash"]
    assert card(name)["top1"] == MEASURED[name]["top1_10000"]
    assert card(name)["holdout"] == 0
    assert card(name)["training_images"] == 60_000
    assert sum(p.numel() for p in loaded.model.parameters()) == MEASURED[name]["parameters"]
