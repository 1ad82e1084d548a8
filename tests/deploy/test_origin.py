"""Recipes and preprocessing that a model tells of itself."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import planish
from planish.deploy.origin import find_preprocessing, find_recipes, plain_recipe
from planish.deploy.packed.architecture import check_recipe, layout_of, recipe_layout
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.deploy.tiny import LOOKS


def test_what_load_model_leaves_in_a_model_and_its_copies():
    loaded = planish.load_model("vit")
    twin = copy.deepcopy(loaded.model)
    assert find_recipes(twin, None)[0] == loaded.recipe
    assert find_preprocessing(twin, None) == loaded.preprocessing
    assert find_preprocessing(twin, LOOKS) == LOOKS


def test_a_model_of_a_file_is_only_built_by_it(tmp_path):
    (tmp_path / "m.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    loaded = planish.load_model(f"{tmp_path / 'm.py'}:build", trust=True)
    assert find_recipes(loaded.model, None) == [loaded.recipe]
    assert find_preprocessing(loaded.model, None) == Preprocessing()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vit", {"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 3}),
        ("test_resnet", {"in_chans": 1}), ("test_efficientnet", {}), ("test_convnext", {"num_classes": 5}),
        ("test_vit", {"norm_layer": nn.LayerNorm}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False])
def test_the_arguments_of_a_timm_model_are_found(name, arguments, kept):
    model = timm.create_model(name, **arguments)
    if not kept:  # as with a timm that does not keep them
        model.__dict__.pop("_model_args", None)
    for recipe in find_recipes(model, None):
        check_recipe(recipe)
        if recipe_layout(recipe, [], 100) == layout_of(model):
            return
    raise AssertionError(find_recipes(model, None))


def test_a_recipe_in_other_words(tmp_path):
    assert plain_recipe("resnet18") == {"source": "timm", "architecture": "resnet18", "arguments": {}}
    file = plain_recipe(f"{tmp_path}/m.py:build")
    assert file == {"source": "file", "path": str(tmp_path / "m.py"), "function": "build"}
    given = {"source": "timm", "architecture": "a", "arguments": {"size": (1, 2)}}
    assert plain_recipe(given)["arguments"] == {"size": [1, 2]}
    for wrong, words in (
        ({"source": "timm", "arguments": {"layer": nn.ReLU}}, "no plain data"),
        ({"source": "hub"}, "source is 'hub'"),
        ("m.py", "name the function"),
    ):
        with pytest.raises(PlanishError, match=words):
            plain_recipe(wrong)
    assert find_recipes(nn.Linear(1, 1), None) == []
    assert torch.nn is nn
