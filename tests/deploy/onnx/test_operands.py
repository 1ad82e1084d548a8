"""Which operands integer kernels take, and which outputs get a grid."""

from __future__ import annotations

import numpy as np
import pytest

from planish.deploy.onnx.operands import operand_of, usable
from planish.deploy.onnx.outputs import add_output_grids, is_own, open_outputs
from planish.deploy.onnx.tidy import quantizers
from planish.errors import PlanishError
from tests.deploy.onnx_graphs import Build, Lowered, plain

X = np.random.default_rng(0).standard_normal((4, 2, 6, 6)).astype(np.float32)


def conv(build, x, *, quantized=True):
    w = np.random.default_rng(1).standard_normal((2, 2, 1, 1)).astype(np.float32)
    weight = build.weight(w, np.float32([0.2, 0.3])) if quantized else build.constant(w)
    return build.node("Conv", build.quantize(x, 0.2, 7), weight, shape=["n", 2, 6, 6])


def residual(*, quantized=True):
    build = Build(["n", 2, 6, 6])
    first = conv(build, "images", quantized=quantized)
    total = build.node("Relu", build.node("Add", conv(build, first, quantized=quantized), first))
    return build.model(build.node("Exp", total))


def test_operands_behind_moves_and_weights():
    build = Build(["n", 2, 6, 6])
    moved = build.node("Flatten", build.node("MaxPool", build.quantize("images", 0.2, 7), kernel_shape=[2, 2]))
    model = build.model(build.node("Sum", moved, build.weight(np.ones((3, 50)), 0.1, granularity="tensor")))
    left, right = map(operand_of, list(model.graph)[-1].inputs)
    assert [move.op_type for move in left.moves] == ["MaxPool", "Flatten"]
    assert left.weight is None
    assert right.weight.bits == 4
    assert right.product == "layer"
    assert operand_of(model.graph.inputs[0]) is operand_of(None) is None
    assert usable(left.grid)


def test_grids_are_added_to_sums_and_convolutions_that_they_go_into():
    model = residual()
    # the first convolution is read by a quantizer and by the sum, the second by the sum alone
    assert len(open_outputs(model.graph)) == 3
    before = plain(model)(X)
    assert add_output_grids(model, [X[:2], X[2:]]) == 3
    own = [node for node in quantizers(model.graph) if is_own(node)]
    assert len(own) == 3
    # the last one lies behind the ReLU, whose smallest number is zero
    assert [int(n.inputs[2].const_value.numpy()) for n in own].count(0) == 1
    lowered = Lowered(model)
    assert lowered.kernels["QLinearConv"] == 2
    assert np.median(np.abs(np.log(lowered(X)) - np.log(before))) < 0.03


def test_no_grids_for_convolutions_that_stay_in_float_anyway():
    assert open_outputs(residual(quantized=False).graph) == []
    assert add_output_grids(residual(quantized=False), []) == 0


def test_grids_need_images():
    with pytest.raises(PlanishError, match="there are no calibration images"):
        add_output_grids(residual(), [])
