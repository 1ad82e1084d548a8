"""`planish export`: a line for each weight, the kernels, the agreement and a table of times."""

from __future__ import annotations

import onnx
import pytest

from planish.deploy.card import read_card


@pytest.fixture(scope="module")
def quantized(shared, options, tmp_path_factory):
    from planish.cli.main import main

    file = tmp_path_factory.mktemp("q") / "q.safetensors"
    arguments = ["quantize", *options, "--scheme", "w4a4", "--method", "rtn", "--calibration-images", "16"]
    assert main([*arguments, "--out", str(file)]) == 0
    return file


def call(planish, file, shared, *more):
    return planish("export", file, "--data", shared / "data", "--trust", "--calibration-images", 8, *more)


def test_prints_weights_kernels_agreement_and_times(planish, quantized, shared, tmp_path):
    out = tmp_path / "m.onnx"
    ended = call(planish, quantized, shared, "--out", out)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines() + ended.err.splitlines()
    for words in ("conv1.weight", "conv2.weight", "head.weight", "x smaller", "integer kernels: ", "float32 ",
                  "onnxruntime int8", "planish w4a4", "same first class as the PyTorch model on "):  # fmt: skip
        assert any(words in line for line in lines), words
    assert read_card(onnx.load(out)).classes == ("class0", "class1", "class2")


def test_refused_in_one_sentence(planish, quantized, shared, tmp_path):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"old")
    cases = [
        ([], "--overwrite"), (["--overwrite", "--layout", "tiny"], "layout is 'tiny'"),
        (["--overwrite", "--constants", "double"], "constants is 'double'"),
        (["--overwrite", "--output-bits", 4], "output-bits is 4"), (["--overwrite", "--images", 0], "give 1 or more"),
    ]  # fmt: skip
    for more, words in cases:
        ended = call(planish, quantized, shared, "--out", out, *more)
        assert ended.status == 2
        assert words in ended.err
        assert "Traceback" not in ended.err
        assert out.read_bytes() == b"old"
    ended = call(planish, quantized, shared, "--out", out, "--overwrite", "--layout", "fast", "--no-timing")
    assert ended.status == 0, ended.err
    assert out.read_bytes() != b"old"


def test_plain_weights_are_refused(planish, shared, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    ended = call(planish, tmp_path / "w.safetensors", shared, "--out", tmp_path / "m.onnx")
    assert ended.status == 2
    assert "holds plain weights" in ended.err


def test_a_network_that_is_named_becomes_a_file_in_float(planish, shared, tmp_path):
    ended = planish("export", "convnet", "--out", tmp_path / "float.onnx", "--images", "20", "--no-timing")
    assert ended.status == 0, ended.err
    assert "float.onnx: float" in ended.out
    assert "integer kernels: none" in ended.out
    assert "20 of 20 images" in ended.out
    ended = planish("export", "absent.safetensors", "--out", tmp_path / "other.onnx")
    assert (ended.status, ended.err) == (2, "planish: the file absent.safetensors is not there\n")
