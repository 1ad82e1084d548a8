"""Every rewriting leaves the outputs bit-equal, and is not done where it would change them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.deploy.onnx.tidy import quantizers, tidy
from tests.deploy.onnx_graphs import Build, plain


def kinds(model):
    return [node.op_type for node in model.graph]


def tidied(model):
    """The graph after tidying, which computes the same, bit for bit."""
    images = 3 * np.random.default_rng(0).standard_normal((4, 2, 6, 6)).astype(np.float32)
    after = model.clone()
    tidy(after.graph)
    np.testing.assert_array_equal(plain(after)(images), plain(model)(images))
    return after


def start(*nodes):
    build, value = Build([4, 2, 6, 6]), "images"
    for op, attributes in nodes:
        value = build.node(op, value, **attributes)
    return build, value


def norm(build, x, factor=1.0, bias=0.0, mean=0.0):
    two = np.ones(2)
    return build.node("BatchNormalization", x, factor * two, bias * two, mean * two, (1 - 1e-5) * two, epsilon=1e-5)


def test_norms_that_compute_nothing_go():
    build, x = start(("Neg", {}))
    assert kinds(tidied(build.model(build.node("Exp", norm(build, x))))) == ["Neg", "Exp"]
    assert kinds(tidied(build.model(norm(build, x)))) == ["Neg"]


@pytest.mark.parametrize("change", [{"factor": 1 + 5e-7}, {"bias": 1e-6}, {"mean": 1e-6}])
def test_norms_that_compute_something_stay(change):
    build, x = start(("Neg", {}))
    assert "BatchNormalization" in kinds(tidied(build.model(norm(build, x, **change))))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_gemm_becomes_a_product_and_a_sum(transposed, biased):
    build, x = start(("Flatten", {"axis": 1}))
    # whole numbers, whose sums are exact in any order
    x = build.node("Round", x)
    weight = np.random.default_rng(1).integers(-4, 4, (3, 72) if transposed else (72, 3))
    out = build.node("Gemm", x, weight, *([np.arange(3.0)] if biased else []), transB=transposed)
    found = kinds(tidied(build.model(out)))
    assert "Gemm" not in found
    assert found.count("MatMul") == 1
    assert ("Add" in found) == biased


def test_gemm_with_factors_stays():
    build, x = start(("Flatten", {"axis": 1}))
    model = build.model(build.node("Gemm", x, np.ones((72, 3)), alpha=2.0))
    assert "Gemm" in kinds(tidied(model))


def test_equal_quantizers_are_one_and_others_are_not():
    build, x = start(("Neg", {}))
    same = [build.quantize(x, 0.3, 7) for _ in range(2)]
    others = [build.quantize(x, 0.3, 6), build.quantize(x, 0.31, 7), build.quantize(x, 0.3, 7, 0, 14),
              build.quantize("images", 0.3, 7)]  # fmt: skip
    total = build.node("Sum", *same, *others)
    assert len(quantizers(tidied(build.model(total)).graph)) == 5


@pytest.mark.parametrize("zero", [0, 5, 15])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(("op", "ends"), [("Relu", ()), ("Clip", (0.0, 1.4)), ("Clip", (-0.2, 1.0)), ("Clip", (0.1,))])
def test_activation_functions_become_limits_of_codes(op, ends, readers, zero):
    build, x = start(("Neg", {}))
    y = build.node(op, x, *(np.array(end) for end in ends))
    read = [build.quantize(y, scale, zero) for scale in (0.2, 0.37)[:readers]]
    assert op not in kinds(tidied(build.model(build.node("Sum", *read))))


def test_limits_taken_in_one_after_another():
    build, x = start(("Neg", {}))
    y = build.node("Relu", build.node("Clip", x, np.array(-1.0), np.array(1.3)))
    after = tidied(build.model(build.quantize(y, 0.2, 4)))
    assert kinds(after) == ["Neg", "FakeQuantize"]
    node = quantizers(after.graph)[0]
    assert (node.attributes["low"].as_int(), node.attributes["high"].as_int()) == (4, 10)


def test_activation_functions_that_something_else_reads_stay():
    build, x = start(("Neg", {}))
    y = build.node("Relu", x)
    assert "Relu" in kinds(tidied(build.model(build.node("Add", build.quantize(y, 0.2, 4), y))))
    build, x = start(("Neg", {}))
    y = build.node("Relu", x)
    build.quantize(y, 0.2, 4)
    assert "Relu" in kinds(tidied(build.model(y)))  # the graph's output
    build, x = start(("Neg", {}))
    channels = build.quantize(build.node("Relu", x), np.float32([0.2, 0.3]).reshape(1, 2, 1, 1), 4,
                              granularity="channel", axis=1)  # fmt: skip
    assert "Relu" in kinds(tidied(build.model(channels)))
    build, x = start(("Neg", {}))
    computed = build.node("ReduceMax", "images", keepdims=0)
    y = build.node("Clip", x, np.array(0.0), computed)
    assert "Clip" in kinds(tidied(build.model(build.quantize(y, 0.2, 4))))


MOVED = {
    "Transpose": {"perm": [0, 2, 3, 1]}, "Flatten": {"axis": 2}, "MaxPool": {"kernel_shape": [3, 3], "pads": [1] * 4},
}  # fmt: skip


@pytest.mark.parametrize("op", MOVED)
def test_quantizers_go_in_front_of_pooling_and_moves(op):
    build, x = start(("Neg", {}), (op, MOVED[op]))
    assert kinds(tidied(build.model(build.node("Exp", build.quantize(x, 0.2, 4))))) == [
        "Neg",
        "FakeQuantize",
        op,
        "Exp",
    ]


def test_quantizers_go_in_front_of_several_moves_and_a_relu():
    build, x = start(("Relu", {}), ("Transpose", {"perm": [0, 2, 3, 1]}))
    x = build.node("Reshape", x, build.constant([4, -1], np.int64))
    x = build.node("Unsqueeze", x, build.constant([1], np.int64))
    after = tidied(build.model(build.quantize(x, 0.2, 4)))
    assert kinds(after) == ["FakeQuantize", "Transpose", "Reshape", "Unsqueeze"]


def test_quantizers_stay_behind_moves_that_something_else_reads_and_with_grids_along_an_axis():
    build, x = start(("Neg", {}), ("Transpose", MOVED["Transpose"]))
    model = build.model(build.node("Add", build.quantize(x, 0.2, 4), x))
    assert kinds(tidied(model)) == ["Neg", "Transpose", "FakeQuantize", "Add"]
    build, x = start(("Neg", {}), ("Transpose", MOVED["Transpose"]))
    model = build.model(build.quantize(x, np.float32([0.2, 0.3]), 4, granularity="channel", axis=3))
    assert kinds(tidied(model)) == ["Neg", "Transpose", "FakeQuantize"]


def test_what_leads_nowhere_goes():
    build, x = start(("Neg", {}))
    build.node("Exp", x)
    after = tidied(build.model(x))
    assert kinds(after) == ["Neg"]
    assert isinstance(after.graph.outputs[0], ir.Value)
    assert not after.graph.initializers
