"""The commands with a folder of Hugging Face and with a network of torchvision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from PIL import Image
from torchvision import models as tv

import planish as package
from planish.deploy.card import read_card
from planish.models import save_weights
from planish.models.huggingface_config import quietly

NAMES = ("bear", "cat", "dog")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small ViT with class names, as save_pretrained writes it, and images of its classes in other folders' names."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    with quietly():
        tf.ViTForImageClassification(config).save_pretrained(folder / "vit")
        tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    save_weights(tv.get_model("squeezenet1_1", num_classes=3), folder / "squeezenet.safetensors")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label in range(3):
            images = folder / "data" / split / f"n0{label}"
            images.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(images / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def quantized(place):
    from planish.cli.main import main

    file = place / "q.safetensors"
    arguments = ["--model", f"hf:{place / 'vit'}", "--data", str(place / "data"), "--calibration-images", "12"]
    assert main(["quantize", *arguments, "--scheme", "w4a8", "--method", "rtn", "--out", str(file)]) == 0
    return file


def test_a_folder_is_quantized_measured_exported_and_classifies(planish, place, quantized, tmp_path):
    assert package.load(quantized).planish_classes == NAMES  # the model's own, not the folders'
    ended = planish("evaluate", quantized, "--data", place / "data")
    assert ended.status == 0, ended.err
    assert "top1" in ended.out
    out = tmp_path / "m.onnx"
    ended = planish("export", quantized, "--data", place / "data", "--no-timing", "--out", out)
    assert ended.status == 0, ended.err
    assert read_card(onnx.load(out)).classes == NAMES
    ended = planish("classify", out, place / "data" / "val" / "n00" / "0.png")
    assert ended.status == 0, ended.err
    assert any(name in ended.out for name in NAMES)


def test_a_name_of_a_folder_and_of_torchvision_become_files_in_float(planish, place, tmp_path):
    ended = planish("export", place / "vit", "--data", place / "data", "--no-timing", "--out", tmp_path / "a.onnx")
    assert ended.status == 0, ended.err
    assert read_card(onnx.load(tmp_path / "a.onnx")).classes == NAMES
    ended = planish("evaluate", "--model", "torchvision:squeezenet1_1", "--weights", place / "squeezenet.safetensors",
                    "--data", place / "data")  # fmt: skip
    assert ended.status == 0, ended.err
    assert "images     12" in ended.out


def test_flattened_weights_go_back_onto_the_folder(planish, place, tmp_path):
    model = ["--model", f"hf:{place / 'vit'}", "--data", place / "data"]
    flat = tmp_path / "flat.safetensors"
    ended = planish("flatten", *model, "--scheme", "w4a4", "--epochs", "1", "--out", flat)
    assert ended.status == 0, ended.err
    ended = planish("evaluate", *model, "--weights", flat)
    assert ended.status == 0, ended.err


def test_a_folder_is_diagnosed_as_a_network_not_as_a_run(planish, place, tmp_path):
    ended = planish("diagnose", place / "vit", "--data", place / "data", "--schemes", "w8a8,w3a3", "--scheme", "w3a3",
                    "--out", tmp_path / "run")  # fmt: skip
    assert ended.status == 0, ended.err
    assert (tmp_path / "run" / "report.html").is_file()


def test_names_that_do_not_work_list_the_kinds(planish, place):
    for name, words in (
        ("no-such", "hf:NAME or a folder that save_pretrained wrote"), ("torchvision:resnet18", "has no weights"),
        ("hf:./not/there", "no such folder"), (f"hf:{place}", "has no config.json"),
    ):  # fmt: skip
        ended = planish("evaluate", "--model", name, "--data", place / "data")
        assert ended.status == 2
        assert words in " ".join(ended.err.split())
        assert "Traceback" not in ended.err
    assert "torchvision:NAME" in " ".join(planish("evaluate", "--help").out.split())
