"""Folders of Hugging Face: what they say is what is loaded, and nothing else of them is read or run."""

from __future__ import annotations

import json
import sys

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from planish.errors import PlanishError
from planish.models import Preprocessing, build, check_classes, classes_of, load_model, save_weights, state_hash
from planish.models.huggingface_config import quietly
from tests.models.tiny_transformers import CLASSES, CONFIGS, network, write

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def change(path, **values):
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_the_network_that_transformers_reads(name, tmp_path):
    write(tmp_path, name)
    with quietly():
        theirs = CONFIGS[name][0].from_pretrained(tmp_path).eval()
    for spelled in (f"hf:{tmp_path}", str(tmp_path)):
        loaded = load_model(spelled)
        assert type(loaded.model) is CONFIGS[name][0]
        assert torch.equal(loaded.model(IMAGES).logits, theirs(IMAGES).logits)
        assert loaded.model.planish_classes == CLASSES
        assert loaded.preprocessing == Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash")
        assert not loaded.model.training
    recipe = json.loads(json.dumps(loaded.recipe))
    assert recipe["architecture"] == CONFIGS[name][0].__name__
    rebuilt = build(recipe).eval()
    rebuilt.load_state_dict(theirs.state_dict())
    assert torch.equal(rebuilt(IMAGES).logits, theirs(IMAGES).logits)


def test_a_new_head_is_always_the_same_and_has_no_names(tmp_path):
    model = write(tmp_path)
    one, two = (load_model(str(tmp_path), num_classes=3) for _ in range(2))
    assert one.weights_hash == two.weights_hash
    assert one.model(IMAGES).logits.shape == (2, 3)
    assert one.recipe["arguments"]["num_labels"] == 3
    assert not hasattr(one.model, "planish_classes")
    key = "vit.layernorm.weight"
    assert torch.equal(one.model.state_dict()[key], model.state_dict()[key])


def test_given_weights_decide_the_head_and_the_folder_needs_none(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tuned = network("vit", id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    save_weights(tuned, tmp_path / "tuned.weights")
    loaded = load_model(f"hf:{tmp_path}", weights=tmp_path / "tuned.weights")
    assert loaded.weights_hash == state_hash(tuned)
    assert not hasattr(loaded.model, "planish_classes")
    with pytest.raises(PlanishError, match=r"does not fit .*classifier"):
        load_model(f"hf:{tmp_path}", weights=tmp_path / "tuned.weights", num_classes=7)
    with pytest.raises(PlanishError, match=r"has no model\.safetensors.*a pickle is not read"):
        load_model(f"hf:{tmp_path}")


def test_half_precision_becomes_float32(tmp_path):
    model = network("vit").half()
    write(tmp_path)
    with quietly():
        model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.classifier.weight, model.classifier.weight.float())


def test_a_pickle_and_code_in_the_folder_are_not_touched(tmp_path):
    write(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass M: pass\n")
    auto = {"AutoConfig": "code.M", "AutoModelForImageClassification": "code.M"}
    change(tmp_path / "config.json", auto_map=auto, _attn_implementation="someone/kernels")
    torch.save({"a": 1}, tmp_path / "pytorch_model.bin")
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is tf.ViTForImageClassification
    assert loaded.model.config._attn_implementation in ("sdpa", "eager")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PlanishError, match="a pickle is not read"):
        load_model(str(tmp_path))
    change(tmp_path / "config.json", model_type="my-own")
    with pytest.raises(PlanishError, match=r"no model\.safetensors"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PlanishError, match="its model_type is 'my-own', expected an image classifier"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "timm_wrapper"}, "name it as timm does"), ({"model_type": "bert"}, "its model_type is 'bert'"),
        ({"model_type": None}, "its model_type is None"), ({"hidden_size": "big"}, "does not take its configuration"),
        ({"hidden_act": "no-such"}, "cannot be built"), ({"num_attention_heads": 5}, "cannot be built|configuration"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized already"),
        ({"patch_size": 4}, "cannot be loaded|lack"), ({"num_hidden_layers": 3}, "its weights lack vit"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_work_are_one_sentence(values, words, tmp_path):
    write(tmp_path)
    change(tmp_path / "config.json", **values)
    with pytest.raises(PlanishError, match=words) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_one_sentence(tmp_path):
    write(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, raw = weights.read_bytes(), config.read_text()
    state = load_file(weights)
    state["classifier.bias"][0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(PlanishError, match=r"NaN in classifier\.bias"):
        load_model(str(tmp_path))
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PlanishError, match="cannot be loaded"):
        load_model(str(tmp_path))
    weights.write_bytes(whole)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PlanishError, match="holds an adapter"):
        load_model(str(tmp_path))
    for text, words in (("[]", "a JSON list"), ("{", "cannot be read as JSON")):
        config.write_text(text)
        with pytest.raises(PlanishError, match=words):
            load_model(str(tmp_path))
    config.write_text(raw)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(PlanishError, match=r"has no preprocessor_config\.json.*save_pretrained"):
        load_model(str(tmp_path))


def test_a_network_without_a_head_needs_num_classes(tmp_path):
    write(tmp_path)
    with quietly():
        network("vit").vit.save_pretrained(tmp_path)
    with pytest.raises(PlanishError, match=r"lack classifier\.bias.*num_classes=N"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), num_classes=4).model(IMAGES).logits.shape == (2, 4)


def test_names_of_the_hub(tmp_path, monkeypatch):
    write(tmp_path)
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load_model("hf:someone/a-vit").model.planish_classes == CLASSES
    assert asked["name"] == "someone/a-vit"
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["allow_patterns"])

    def offline(*_, **__):
        raise OSError("no route\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(PlanishError, match="a-vit could not be fetched from the hub: no route; name a local"):
        load_model("hf:someone/a-vit")
    for name in ("hf:./not-there/at/all", "hf:"):
        with pytest.raises(PlanishError, match="there is no such folder, and it is no name of the hub"):
            load_model(name)


def test_what_to_install(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlanishError, match=r"transformers is not installed .*pip install 'planish\[hf\]'"):
        load_model(str(tmp_path))


class Data:
    """A stand-in for images in class folders."""

    def __init__(self, classes):
        self.classes, self.name, self.test = classes, "folder", [(IMAGES[0], 0)]


def test_class_names_of_the_model_and_the_data(tmp_path):
    write(tmp_path)
    model = load_model(str(tmp_path)).model
    other = ["n01", "n02", "n03", "n04", "n05"]
    for classes in (list(CLASSES), other):
        check_classes(model, Data(classes))
        assert classes_of(model, Data(classes)) == list(CLASSES)
    with pytest.raises(PlanishError, match="class 0 is 'cat' and that of folder is 'pig': the names are the same in"):
        check_classes(model, Data(list(reversed(CLASSES))))
    assert classes_of(torch.nn.Identity(), Data(other)) == other
