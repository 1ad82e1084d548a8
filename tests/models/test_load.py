"""Models by name, from timm and from files, with weights of any origin."""

import json

import pytest
import timm
import torch
from torch import nn

from planish.data import load_data
from planish.errors import PlanishError
from planish.models import Preprocessing, build, check_classes, load_model, save_weights, state_hash
from planish.models import embedded as embedded_module

ARGUMENTS = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}


@pytest.fixture
def own_weights(tmp_path, monkeypatch):
    """A stand-in for the embedded files, of the same format."""
    arguments = {**ARGUMENTS, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    values = {"architecture": "vit_tiny_patch16_224", "arguments": arguments, "mean": [0.286], "std": [0.353]}
    save_weights(model, tmp_path / "vit.safetensors", {"planish": json.dumps(values)})
    monkeypatch.setattr(embedded_module, "WEIGHTS", tmp_path)
    return model, tmp_path


def test_embedded_weights_preprocessing_and_recipe(own_weights):
    model, _ = own_weights
    loaded = load_model("vit")
    assert loaded.weights_hash == state_hash(model) == state_hash(loaded.model)
    assert not loaded.model.training
    assert loaded.preprocessing == Preprocessing((1, 28, 28), (0.286,), (0.353,), crop_pct=1.0)
    rebuilt = build(json.loads(json.dumps(loaded.recipe)))
    rebuilt.load_state_dict(loaded.model.state_dict())
    image = torch.randn(2, 1, 28, 28)
    assert torch.equal(rebuilt.eval()(image), loaded.model(image))


def test_another_number_of_classes_gets_a_new_head_always_the_same(own_weights):
    hashes = {load_model("vit", num_classes=3).weights_hash for _ in range(2)}
    loaded = load_model("vit", num_classes=3)
    assert len(hashes) == 1
    assert loaded.model(torch.zeros(1, 1, 28, 28)).shape == (1, 3)
    assert torch.equal(loaded.model.state_dict()["blocks.0.attn.qkv.weight"], own_weights[0].blocks[0].attn.qkv.weight)
    assert build(loaded.recipe).state_dict()["head.weight"].shape == (3, 16)


def test_given_weights_decide_the_head(own_weights, tmp_path):
    tuned = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS, num_classes=4)
    save_weights(tuned, tmp_path / "tuned.safetensors")
    assert load_model("vit", weights=tmp_path / "tuned.safetensors").weights_hash == state_hash(tuned)
    with pytest.raises(PlanishError, match=r"head.weight has shape \(4, 16\) instead of \(7, 16\)"):
        load_model("vit", weights=tmp_path / "tuned.safetensors", num_classes=7)


def test_damaged_or_missing_embedded_files(own_weights):
    with pytest.raises(PlanishError, match="not there"):
        load_model("convnet")
    save_weights(own_weights[0], own_weights[1] / "vit.safetensors")
    with pytest.raises(PlanishError, match="lacks its card"):
        load_model("vit")
    with pytest.raises(PlanishError, match="no embedded model"):
        embedded_module.card("resnet")


def test_timm_with_local_weights(tmp_path):
    model = timm.create_model("test_resnet", num_classes=6)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    loaded = load_model("test_resnet", weights=tmp_path / "w.pth")
    assert loaded.weights_hash == state_hash(model)
    assert loaded.recipe == {"source": "timm", "architecture": "test_resnet", "arguments": {"num_classes": 6}}
    assert loaded.preprocessing.input_size == model.pretrained_cfg["input_size"]
    with pytest.raises(PlanishError, match=r"does not fit test_vit: .* keys differ"):
        load_model("test_vit", weights=tmp_path / "w.pth")


def test_a_failed_download_says_what_to_do(monkeypatch):
    def offline(*_, pretrained, **__):
        assert pretrained
        raise OSError("connection refused\nmore lines")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(PlanishError, match="of test_resnet could not be fetched: connection refused; --weights FILE"):
        load_model("test_resnet")


def test_unknown_names_get_three_suggestions():
    with pytest.raises(PlanishError, match=r"kd\.safetensors is a file, no model: .* goes into --weights"):
        load_model("kd.safetensors")
    with pytest.raises(PlanishError, match=r"'resnet_50'.*closest") as caught:
        load_model("resnet_50")
    names = str(caught.value).split(" are ")[1].split(", ")
    assert len(names) == 3
    assert "resnet50" in names
    with pytest.raises(PlanishError, match="num_classes is -1: give the number of outputs, or 0"):
        load_model("vit", num_classes=-1)


FILE = """
import neighbour
from torch import nn

def build():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    model.planish_preprocessing = {"input_size": [1, 28, 28], "mean": [0.5], "std": [0.25], "crop_pct": 1.0}
    return model

def plain(): return nn.Identity()
def wrong(): return 3
def broken(): raise KeyError("no")
"""


def test_a_model_from_a_file(tmp_path):
    (tmp_path / "neighbour.py").write_text("")
    path = tmp_path / "my model.py"
    path.write_text(FILE)
    loaded = load_model(f"{path}:build", trust=True)
    assert loaded.preprocessing == Preprocessing((1, 28, 28), (0.5,), (0.25,), crop_pct=1.0)
    save_weights(loaded.model, tmp_path / "w.safetensors")
    assert load_model(f"{path}:build", weights=tmp_path / "w.safetensors", trust=True).weights_hash == (
        loaded.weights_hash
    )
    assert load_model(f"{path}:plain", trust=True).preprocessing == Preprocessing()
    cases = {"wrong": "returned a int", "broken": "raised KeyError", "absent": "no function 'absent'"}
    for function, words in cases.items():
        with pytest.raises(PlanishError, match=words):
            load_model(f"{path}:{function}", trust=True)
    with pytest.raises(PlanishError, match="name the function"):
        load_model(str(path), trust=True)
    with pytest.raises(PlanishError, match="does not exist"):
        load_model(f"{tmp_path}/absent.py:build", trust=True)


def test_a_file_is_not_run_without_trust(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PlanishError, match="would run the Python code"):
        load_model(f"{path}:build")
    assert not (tmp_path / "ran").exists()


def test_check_classes():
    data = load_data(None, Preprocessing((1, 28, 28), (0.5,), (0.5,), crop_pct=1.0))
    check_classes(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), data)
    for model, words in (
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 9)), "9 logits and fashion-mnist has 10 classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), r"cannot take images of shape \(1, 28, 28\)"),
        (nn.Conv2d(1, 10, 3), "expected logits"),
    ):
        model.train()
        with pytest.raises(PlanishError, match=words):
            check_classes(model, data)
        assert model.training
