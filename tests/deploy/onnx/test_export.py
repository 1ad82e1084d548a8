"""Whole networks as files: their answers, what can be asked of the file, and what is refused."""

from __future__ import annotations

import copy
import re
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from planish.deploy.card import read_card
from planish.deploy.checkpoint import load, save
from planish.deploy.classify import Classifier
from planish.deploy.onnx import export as module
from planish.deploy.onnx import graph
from planish.deploy.onnx.export import export
from planish.deploy.onnx.runtime import FLOAT, INTEGER, open_session
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.ptq import quantize
from planish.qat import train_quantized
from planish.scheme import Format, Scheme
from tests.deploy.tiny import LOOKS, RECIPES, network

torch.set_num_threads(1)
TRACED = {}
SMALL = Preprocessing((1, 12, 12), (0.5,), (0.5,), crop_pct=1.0)


def sequential(*, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.GELU(), nn.Flatten(), nn.Linear(16 * 9, classes),
    ).eval()  # fmt: skip


def count_kernels(exported):
    """The integer and the float products in what ONNX Runtime executes."""
    kinds = Counter()
    for kernel, count in exported.kernels.items():
        if kernel in INTEGER or kernel in FLOAT:
            kinds["integer" if kernel in INTEGER else "float"] += count
    return kinds


def small_images(count=8):
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def small():
    return quantize(sequential(), [small_images()], "w4a4")


@pytest.fixture(scope="module")
def networks():
    made = {}
    for name in RECIPES:
        model, images = network(name)
        made[name] = quantize(model, [images], "w4a4"), images
    return made


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Tracing a network takes seconds, and many tests export the same one."""
    trace = graph.network_graph

    def traced(model, example):
        key = id(model), example.shape
        if key not in TRACED:
            TRACED[key] = model, trace(model, example)  # with the model, so that its id stays its own
        return TRACED[key][1].clone()

    monkeypatch.setattr(graph, "network_graph", traced)


def precisely(model, images):
    """The logits in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(images.double()).numpy()


@pytest.mark.parametrize("name", RECIPES)
def test_a_network_of_timm_in_both_layouts_for_any_number_of_images(networks, name, tmp_path):
    model, images = networks[name]
    done = {
        layout: export(model, tmp_path / f"{layout}.onnx", images=[images], layout=layout, preprocessing=LOOKS)
        for layout in ("small", "fast")
    }
    # a rounding of the network's own float32 may fall to either side of a boundary: never here
    assert done["small"].agreement.largest < 1e-4
    assert not done["small"].agreement.differing
    assert count_kernels(done["small"])["integer"] >= len(done["small"].forms) - len(done["small"].in_float)
    assert done["small"].bytes < done["fast"].bytes
    sessions = [open_session(tmp_path / f"{layout}.onnx") for layout in done]
    more = torch.randn(16, *LOOKS.input_size, generator=torch.Generator().manual_seed(1))
    for count in (1, 3, 16):
        small, fast = (session.run(None, {"images": more[:count].numpy()})[0] for session in sessions)
        np.testing.assert_array_equal(small, fast)
        assert np.median(np.abs(small - precisely(model, more[:count]))) < 1e-4
    assert "integer kernels: " in str(done["small"])


@pytest.mark.parametrize(("name", "scheme"), [("vit", "w4a4"), ("resnet", "w8a8"), ("resnet", "w4a4")])
def test_openvino_agrees(networks, name, scheme, tmp_path):
    openvino = pytest.importorskip("openvino")
    model, images = networks[name]
    if scheme == "w8a8":
        model = quantize(network(name)[0], [images], scheme)
    export(model, tmp_path / "m.onnx", preprocessing=LOOKS)
    ours = open_session(tmp_path / "m.onnx").run(None, {"images": images.numpy()})[0]
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    theirs = compiled(images.numpy())[0]
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))
    # sums in another order may end on the other side of a boundary
    assert np.median(np.abs(ours - theirs)) < 1e-3


def test_openvino_does_not_take_two_bits(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = quantize(sequential(), [small_images()], "w2a4")
    export(model, tmp_path / "m.onnx", preprocessing=SMALL)
    with pytest.raises(RuntimeError):
        openvino.Core().compile_model(tmp_path / "m.onnx", "CPU")
    export(model, tmp_path / "m.onnx", preprocessing=SMALL, layout="fast")
    openvino.Core().compile_model(tmp_path / "m.onnx", "CPU")


def test_card_and_classifier(small, tmp_path):
    export(small, tmp_path / "m.onnx", preprocessing=SMALL, classes=["a", "b", "c"], name="tiny",
           protocol={"seed": 3})  # fmt: skip
    card = read_card(onnx.load(tmp_path / "m.onnx"))
    assert (card.name, card.scheme, card.classes, card.preprocessing, card.protocol) == (
        "tiny", "w4a4", ("a", "b", "c"), SMALL, {"seed": 3},
    )  # fmt: skip
    classifier = Classifier(tmp_path / "m.onnx")
    with torch.no_grad():
        expected = small(small_images())
    got = np.stack([classifier.run(image)[0] for image in small_images().numpy()])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_model_in_float(tmp_path):
    done = export(sequential(), tmp_path / "m.onnx", preprocessing=SMALL)
    assert (done.scheme, done.weights, done.forms) == ("float", {}, ())
    assert done.agreement.largest < 1e-5
    assert read_card(onnx.load(tmp_path / "m.onnx")).classes == ("class 0", "class 1", "class 2")


def test_products_on_integers_and_the_sizes_of_their_weights(small, tmp_path):
    done = export(small, tmp_path / "m.onnx", preprocessing=SMALL)
    assert not done.in_float
    assert count_kernels(done) == {"integer": 4}
    assert done.weights == {"0.weight": (72, 288), "3.weight": (36, 288), "5.weight": (64, 512),
                            "8.weight": (432, 1728)}  # fmt: skip
    assert done.agreement.largest < 1e-5
    assert done.agreement.what == "random images"
    assert "same first class as the PyTorch model on 8 of 8 random images" in str(done)


WEIGHTS = {
    "affine": Format(4, "channel", symmetric=False), "group": Format(4, "group", group_size=1),
    "half-integer": Format(2, "channel", half_integer=True), "half-integer of 8 bits": Format(8, half_integer=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_format_of_weights(name, tmp_path):
    scheme = Scheme("own", WEIGHTS[name], Format(4, symmetric=False), edge_bits=None)
    model = quantize(sequential(), [small_images()], scheme)
    done = export(model, tmp_path / "m.onnx", preprocessing=SMALL, images=[small_images(32)])
    assert done.agreement.largest < 1e-4
    assert bool(done.in_float) == (name != "half-integer")


def test_grids_on_outputs_come_from_calibration(small, tmp_path):
    done = export(small, tmp_path / "m.onnx", preprocessing=SMALL, output_bits=8, calibration=[small_images(16)],
                  images=[(small_images(64), torch.zeros(64))])  # fmt: skip
    assert done.output_grids == 1
    assert done.agreement.largest < 0.05
    assert len(done.agreement.differing) <= 1
    assert "QLinearConv" in {form.kernel for form in done.forms if form.name == "5"}
    assert "1 outputs of convolutions and sums have a grid of 8 bits" in str(done)


@pytest.mark.parametrize("method", ["lsq", "dorefa", "ofq"])
def test_what_training_gives_back(method, tmp_path):
    model, images = network("vit" if method == "ofq" else "resnet")
    loader = [(images, torch.arange(len(images)) % 3)]
    trained = train_quantized(model, loader, "w4a4", method, calibration=[images], epochs=1, seed=0)  # fmt: skip
    done = export(trained, tmp_path / "m.onnx", preprocessing=LOOKS, images=[images])
    assert done.agreement.largest < 1e-3
    assert not done.agreement.differing
    assert all(form.why for form in done.in_float)


def test_the_file_says_nothing_of_the_machine(networks, tmp_path):
    model, _ = networks["resnet"]
    export(model, tmp_path / "m.onnx", preprocessing=LOOKS)
    content = (tmp_path / "m.onnx").read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content


def test_a_loaded_model_gives_the_same_file(networks, tmp_path):
    model, _ = networks["resnet"]
    save(model, tmp_path / "q.safetensors", recipe=RECIPES["resnet"], preprocessing=LOOKS)
    given = {"preprocessing": LOOKS, "name": "m", "protocol": {}}
    export(model, tmp_path / "a.onnx", **given)
    export(load(tmp_path / "q.safetensors"), tmp_path / "b.onnx", **given)
    a, b = (onnx.load(tmp_path / name).graph for name in ("a.onnx", "b.onnx"))
    assert [(n.op_type, n.input, n.output) for n in a.node] == [(n.op_type, n.input, n.output) for n in b.node]
    tensors = [{t.name: onnx.numpy_helper.to_array(t) for t in g.initializer} for g in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        np.testing.assert_array_equal(tensors[0][name], tensors[1][name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "tiny"}, "layout is 'tiny'"), ({"output_bits": 4}, "output_bits is 4"),
        ({"output_bits": 8}, "output_bits needs calibration"),
        ({"output_bits": 8, "calibration": []}, "there are no calibration images"),
        ({"classes": ["a"]}, "1 class names for 3 logits"), ({"images": []}, "there are no images to compare"),
        ({"protocol": {"x": float("nan")}}, "cannot be written as JSON"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence_and_the_old_file_stays(small, options, words, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(PlanishError, match=re.escape(words)) as caught:
        export(small, path, preprocessing=SMALL, **options)
    assert "\n" not in str(caught.value)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_a_file_that_the_runtime_does_not_take_never_replaces_the_old_one(small, tmp_path, monkeypatch):
    def fails(*_):
        raise PlanishError("ONNX Runtime does not take the graph")

    monkeypatch.setattr(module, "open_session", fails)
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(PlanishError, match="does not take"):
        export(small, tmp_path / "m.onnx", preprocessing=SMALL)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_models_without_logits(tmp_path):
    with pytest.raises(PlanishError, match="does not give logits of shape"):
        export(nn.Conv2d(1, 2, 3), tmp_path / "m.onnx", preprocessing=SMALL)
    assert not list(tmp_path.iterdir())
