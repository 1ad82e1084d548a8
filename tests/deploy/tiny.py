"""Small networks of timm with their recipes."""

from __future__ import annotations

import timm
import torch

from planish.models import Preprocessing

LOOKS = Preprocessing((1, 32, 32), (0.5,), (0.5,), crop_pct=1.0)
RECIPES = {
    "resnet": {"source": "timm", "architecture": "test_resnet", "arguments": {"num_classes": 3, "in_chans": 1}},
    "vit": {"source": "timm", "architecture": "test_vit", "arguments": {
        "num_classes": 3, "in_chans": 1, "img_size": 32, "patch_size": 8}},
}  # fmt: skip


def network(name):
    """The network of a recipe with BatchNorm statistics that are worth folding, and images."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = timm.create_model(recipe["architecture"], **recipe["arguments"])
    images = torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        model.train()(images)
    return model.eval(), images
