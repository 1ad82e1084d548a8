"""The classifier: right answers, files that are not what they should be, and no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from planish.deploy.classify import Classifier
from planish.errors import PlanishError
from planish.preprocessing import Preprocessing
from tests.deploy.tiny_onnx import CLASSES, save_tiny, tiny_card, tiny_model, weights


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "m.onnx")


def test_the_answer_is_the_softmax_of_the_networks_output(model, tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    Image.fromarray(pixels).save(tmp_path / "a.png")
    logits = ((pixels / 255 - 0.5) / 0.25).reshape(-1) @ weights(tiny_card())
    expected = np.exp(logits) / np.exp(logits).sum()
    (answer,) = Classifier(model).classify([tmp_path / "a.png"])
    order = np.argsort(-expected)
    assert answer.labels == tuple(CLASSES[i] for i in order)
    assert np.allclose(answer.probabilities, expected[order], atol=1e-6)
    assert abs(sum(answer.probabilities) - 1) < 1e-12
    assert answer.milliseconds > 0
    assert answer.top(2) == list(zip(answer.labels, answer.probabilities, strict=True))[:2]
    assert len(answer.top(99)) == 3


def test_paths_texts_open_files_and_images_give_the_same(model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    image.save(tmp_path / "a.png")
    classifier = Classifier(str(model), threads=2)
    with open(tmp_path / "a.png", "rb") as file:
        answers = classifier.classify([tmp_path / "a.png", str(tmp_path / "a.png"), file, image])
    assert len({(answer.labels, answer.probabilities) for answer in answers}) == 1
    assert (classifier.size, classifier.card) == (model.stat().st_size, tiny_card())


def test_large_logits_do_not_overflow(tmp_path):
    path = save_tiny(tmp_path / "m.onnx", weight=1e4 * weights(tiny_card()))
    (answer,) = Classifier(path).classify([Image.new("L", (8, 8), 255)])
    assert answer.top(2)[0] == ("light", 1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite(tmp_path, value):
    path = save_tiny(tmp_path / "m.onnx", weight=value * np.ones((64, 3), np.float32))
    with pytest.raises(PlanishError, match="not finite"):
        Classifier(path).classify([Image.new("L", (8, 8), 255)])


def refuse(path, words):
    with pytest.raises(PlanishError, match=words) as caught:
        Classifier(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_models(tmp_path, capfd):
    refuse(tmp_path / "gone.onnx", "does not exist")
    refuse(tmp_path, "is no file")
    for content in (b"", b"junk" * 100):
        (tmp_path / "bad.onnx").write_bytes(content)
        refuse(tmp_path / "bad.onnx", "not an ONNX model")
    whole = tiny_model(tiny_card()).SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "bad.onnx", "not an ONNX model|not exported by planish")
    assert capfd.readouterr() == ("", "")  # ONNX Runtime's own log is silent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {}}, "not exported by planish"),
        ({"metadata": {"planish": "{"}}, "not JSON"),
        ({"input": "pixels"}, "'images'.*'pixels'"),
        ({"output": "scores"}, "'logits'.*'scores'"),
        ({"input_type": TensorProto.UINT8}, "uint8"),
        ({"shape": ["batch", 1, 16, 4]}, "16, 4"),
        ({"shape": [4, 1, 8, 8]}, r"\[4, 1, 8, 8\]"),
        ({"shape": ["batch", 64]}, r"\['batch', 64\]"),
        ({"weight": np.zeros((64, 5), np.float32)}, "batch, 3.*'batch', 5"),
    ],
)
def test_models_other_than_their_card(tmp_path, changes, words):
    refuse(save_tiny(tmp_path / "m.onnx", **changes), words)


def test_an_interpolation_that_cannot_be_done(tmp_path):
    card = tiny_card(preprocessing=Preprocessing((1, 8, 8), (0.5,), (0.5,), "random"))
    refuse(save_tiny(tmp_path / "m.onnx", card), "'random'")


def test_symbolic_sides_follow_the_card(tmp_path):
    path = save_tiny(tmp_path / "m.onnx", shape=["n", "c", "h", "w"])
    assert Classifier(path).classify([Image.new("L", (20, 9), 255)])[0].labels[0] == "light"


def test_a_model_that_fails_on_its_input(tmp_path, capfd):
    graph = tiny_model(tiny_card(), shape=["n", "c", "h", "w"])
    graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros((60, 3), np.float32), "weight"))
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(PlanishError, match="the model fails") as caught:
        Classifier(tmp_path / "m.onnx").classify([Image.new("L", (8, 8))])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_images_that_cannot_be_used_are_named(model, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:800])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    Image.new("L", (9000, 1)).save(tmp_path / "hair.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 39_999)
    classifier = Classifier(model)
    for name, words in (
        ("cut.jpg", "truncated"), ("text.png", "not an image"), ("bomb.png", "too large: 200 x 200"),
        ("hair.png", "too large: .*resized to 72000 x 8"), ("gone.png", "does not exist"), (".", "is no file"),
    ):  # fmt: skip
        with pytest.raises(PlanishError, match=words) as caught:
            classifier.classify([tmp_path / name])
        assert str(caught.value).startswith(str(tmp_path / name))


def test_threads_are_at_least_one(model):
    with pytest.raises(PlanishError, match="threads is 0"):
        Classifier(model, threads=0)


def test_without_onnx_runtime_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PlanishError, match=r"pip install planish\[onnx\]"):
        Classifier(model)


def test_the_command_imports_neither_torch_nor_what_brings_it(model, tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    program = (
        "import sys\nfrom planish.cli.main import main\n"
        f"status = main(['classify', {str(model)!r}, {str(tmp_path / 'a.png')!r}])\n"
        "heavy = ('torch', 'torchvision', 'timm', 'accelerate', 'torchmetrics', 'safetensors', 'onnx', 'matplotlib')\n"
        "print(status, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["0 []"]
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: light ")


@pytest.mark.parametrize("where", ["../secret.bin", "absolute"])
def test_tensors_outside_the_models_folder_are_refused(tmp_path, where):
    card = tiny_card()
    model, values = tiny_model(card), weights(card)
    (tmp_path / "secret.bin").write_bytes(values.tobytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = where if where != "absolute" else str(tmp_path / "secret.bin")
    for key, value in (("location", location), ("offset", "0"), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    refuse(tmp_path / "in" / "m.onnx", "External data path")
