"""Recipes of transformers and torchvision: files that another process loads, and hostile ones that it refuses."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from torchvision import models as tv

import planish
from planish.deploy.checkpoint import read_head
from planish.deploy.origin import find_classes, find_recipes, plain_recipe
from planish.deploy.packed.architecture import built, check_recipe, layout_of, recipe_layout
from planish.deploy.packed.container import KEY, read_data, read_table, tensor_at, to_bytes
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.models.huggingface_config import FAMILIES, quietly
from tests.models.tiny_transformers import CLASSES, CONFIGS, network, write

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LOOKS = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)


def hf_recipe(name="vit", **changes):
    (recipe,) = find_recipes(network(name), None)
    recipe = copy.deepcopy(recipe)
    recipe["arguments"].update(changes)
    return recipe


def tv_recipe(architecture="resnet18", **arguments):
    return {"source": "torchvision", "architecture": architecture, "arguments": arguments}


def checked_layout(recipe):
    check_recipe(recipe)
    return recipe_layout(recipe, [], 100)


LOADER = """
import sys, torch, planish
model = planish.load(sys.argv[1])
output = model(torch.load(sys.argv[2], weights_only=True))
torch.save(getattr(output, "logits", output), sys.argv[3])
"""


def in_a_new_process(path, folder):
    torch.save(IMAGES, folder / "images.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADER, str(path), str(folder / "images.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


def test_a_quantized_folder_comes_back_without_it_in_another_process(tmp_path):
    (tmp_path / "given").mkdir()
    write(tmp_path / "given", "swin")
    loaded = planish.load_model(f"hf:{tmp_path / 'given'}")
    quantized = planish.quantize(loaded.model, [IMAGES], "w4a4")
    planish.save(quantized, tmp_path / "q.safetensors")
    for file in (tmp_path / "given").iterdir():
        file.unlink()
    head = read_head(tmp_path / "q.safetensors")
    assert head.classes == CLASSES
    assert head.preprocessing == loaded.preprocessing
    assert head.recipe["source"] == "hf"
    assert torch.equal(in_a_new_process(tmp_path / "q.safetensors", tmp_path), quantized(IMAGES).logits)


def test_a_quantized_network_of_torchvision_comes_back_in_another_process(tmp_path):
    torch.manual_seed(0)
    model = tv.get_model("mobilenet_v3_small", num_classes=4).eval()
    quantized = planish.quantize(model, [IMAGES], "w4a8")
    with pytest.raises(PlanishError, match=r"not known how to build this MobileNetV3 again.*torchvision:NAME"):
        planish.save(quantized, tmp_path / "q.safetensors", preprocessing=LOOKS)
    recipe = tv_recipe("mobilenet_v3_small", num_classes=4)
    planish.save(quantized, tmp_path / "q.safetensors", recipe=recipe, preprocessing=LOOKS)
    assert torch.equal(in_a_new_process(tmp_path / "q.safetensors", tmp_path), quantized(IMAGES))
    assert plain_recipe("torchvision:resnet18") == tv_recipe()
    with pytest.raises(PlanishError, match="the recipe does not build this model"):
        planish.save(quantized, tmp_path / "q2", recipe="torchvision:resnet18", preprocessing=LOOKS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_that_transformers_made_tells_its_recipe(name, tmp_path):
    model = network(name)
    planish.save(model, tmp_path / "m", preprocessing=LOOKS)
    loaded = planish.load(tmp_path / "m")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IMAGES).logits, model(IMAGES).logits)
    assert loaded.planish_classes == find_classes(model, None) == CLASSES
    assert find_classes(model, ["a"]) == ("a",)
    (recipe,) = find_recipes(model, None)
    assert recipe_layout(recipe, [], 100) == layout_of(model) == layout_of(built(recipe, []))


def test_a_layout_takes_no_memory():
    big = hf_recipe("vit", hidden_size=4096, num_hidden_layers=24, num_attention_heads=32, intermediate_size=16384)
    check_recipe(big)
    recipe_layout(hf_recipe("vit"), [], 100)  # what is imported once
    tracemalloc.start()
    try:
        assert sum(torch.Size(s).numel() for _, s in recipe_layout(big, [], 400).tensors.values()) > 4 * 10**9
        assert recipe_layout(tv_recipe("vit_h_14"), [], 400).tensors
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "TimmWrapperForImageClassification", "CLIPForImageClassification", "os",
             "ViTModel", "hf:someone/x", "/tmp/x", None, 3, ["ViTForImageClassification"], "x" * 5000],
)  # fmt: skip
def test_what_is_no_classifier_of_transformers(name):
    with pytest.raises(PlanishError, match="is no image classifier of transformers that planish builds") as caught:
        check_recipe({**hf_recipe(), "architecture": name})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auto_map", {"AutoConfig": "x"}), ("quantization_config", {}), ("_attn_implementation", "a"),
        ("_name_or_path", ""),
        ("attn_implementation", "a"), ("backbone", "resnet18"), ("use_pretrained_backbone", True), ("dtype", "float16"),
        ("torch_dtype", "float16"), ("hidden_sizee", 3), ("id2label", {"0": "a"}), ("output_hidden_states", True),
        ("hidden_size", 10**9), ("hidden_act", "a/b"), ("hidden_act", "x" * 100), ("num_labels", True),
        ("num_labels", 0), ("num_labels", 10**7), ("num_labels", "3"), ("per_layer_config", {"0": {"hidden_size": 3}}),
    ],
)  # fmt: skip
def test_settings_that_are_not_taken(name, value):
    with pytest.raises(PlanishError, match=r"may not take|not accepted|has no setting|has num_labels"):
        check_recipe(hf_recipe(**{name: value}))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "32"}, {"hidden_size": 3.5}, {"hidden_size": None}, {"num_attention_heads": 0},
     {"hidden_act": "no-such"}, {"patch_size": 0}, {"image_size": {"a": 1}}, {"qkv_bias": "yes"},
     {"hidden_size": -32}, {"num_hidden_layers": [2]}, {"layer_norm_eps": "a"}],
)  # fmt: skip
def test_values_of_the_wrong_type_are_one_sentence(changes):
    recipe = hf_recipe(**changes)
    with pytest.raises(PlanishError, match="ViTForImageClassification cannot be built: ") as caught:
        checked_layout(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (tv_recipe("no_such"), "no classifier 'no_such'"), (tv_recipe("fasterrcnn_resnet50_fpn"), "no classifier"),
        (tv_recipe(3), "no classifier 3"), (tv_recipe(weights="DEFAULT"), "may not take the argument 'weights'"),
        (tv_recipe(weights_backbone="DEFAULT"), "may not take"), (tv_recipe(progress=True), "may not take"),
        (tv_recipe(no_such=1), "cannot be built"), (tv_recipe(norm_layer="os.system"), "cannot be built"),
        (tv_recipe(num_classes="many"), "cannot be built"), (tv_recipe(width_per_group=10**9), "not accepted"),
        ({**tv_recipe(), "source": "hub"}, "its recipe is none"), ({**tv_recipe(), "source": ["hf"]}, "recipe is none"),
        ({**tv_recipe(), "more": 1}, "its recipe is none"), ({"source": "hf"}, "its recipe is none"),
    ],
)  # fmt: skip
def test_recipes_of_torchvision_that_are_refused(recipe, words):
    with pytest.raises(PlanishError, match=words) as caught:
        checked_layout(recipe)
    assert "\n" not in str(caught.value)


def test_architectures_without_end_are_given_up():
    began = time.perf_counter()
    for recipe in (hf_recipe(num_hidden_layers=16_000), hf_recipe("swin", depths=[8000, 8000]),
                   hf_recipe("convnext", depths=[8000, 8000])):  # fmt: skip
        check_recipe(recipe)
        with pytest.raises(PlanishError, match="far more parts than the file has tensors"):
            recipe_layout(recipe, [], 10)
    assert time.perf_counter() - began < 60


def test_tables_that_no_file_holds_must_be_small():
    """Swin computes a table of indices of (window size)^4 entries, which is allocated with the network."""
    recipe = hf_recipe("swin", window_size=128, image_size=512)
    check_recipe(recipe)
    with pytest.raises(PlanishError, match=r"has \d+ bytes of tables beside \d+ of tensors"):
        recipe_layout(recipe, [], 100)


@pytest.mark.parametrize("source", ["hf", "torchvision"])
def test_a_file_with_another_recipe_is_refused(source, tmp_path):
    """The weights of a network under the recipe of another one."""
    planish.save(network("vit"), tmp_path / "m", preprocessing=LOOKS)
    other = hf_recipe("vit", hidden_size=64) if source == "hf" else tv_recipe()
    with (tmp_path / "m").open("rb") as file:
        table = read_table(file)
        data = read_data(file, table)
    head = json.loads(table.metadata[KEY])
    head["recipe"] = other
    tensors = {key: tensor_at(data, entry).clone() for key, entry in table.entries.items()}
    (tmp_path / "m").write_bytes(to_bytes(tensors, json.dumps(head)))
    with pytest.raises(PlanishError, match="does not fit the architecture it names"):
        planish.load(tmp_path / "m")


@pytest.mark.parametrize(
    "name", ["swin_t", "maxvit_t", "vit_b_16", "convnext_tiny", "inception_v3", "densenet121", "regnet_y_400mf"]
)
def test_networks_of_torchvision_have_a_layout(name):
    with torch.device("meta"):
        like = built(tv_recipe(name, num_classes=7), [])
    layout = checked_layout(tv_recipe(name, num_classes=7))
    assert layout == layout_of(like)
    assert {shape[0] for key, (_, shape) in layout.tensors.items() if 7 in shape[:1]} == {7}


def test_every_family_of_transformers_has_a_layout():
    """With the settings that transformers has for it, so that its networks can be saved."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSES_OF

    for family in FAMILIES:
        with quietly(), torch.device("meta"):
            config = CONFIG_MAPPING[family]()
            kind = CLASSES_OF[type(config)]
            model = (kind[0] if isinstance(kind, tuple) else kind)(config)
        (recipe,) = find_recipes(model, None)
        check_recipe(recipe)
        assert recipe_layout(recipe, [], len(model.state_dict())) == layout_of(model), family
