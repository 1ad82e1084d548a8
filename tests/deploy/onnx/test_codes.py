"""Codes of activations in ONNX Runtime against the grid's own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from planish.deploy.onnx.codes import Activations
from planish.deploy.onnx.edit import Editor
from planish.deploy.onnx.graph import DOMAIN
from planish.deploy.onnx.operands import operand_of
from planish.deploy.onnx.runtime import open_session
from tests.deploy.onnx_graphs import Build


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("low", "high", "zero"), [(0, 15, 6), (-8, 7, 0), (0, 255, 130), (-128, 127, 3), (0, 3, 0)])
def test_codes_and_values(low, high, zero, signed):
    x = np.concatenate([np.linspace(-40, 40, 999), np.arange(-40, 40) / 4]).astype(np.float32)  # ties among them
    build = Build(["n"])
    model = build.model(build.node("Neg", build.quantize("images", 0.5, zero, low, high)))
    neg = list(model.graph)[-1]
    operand = operand_of(neg.inputs[0])
    activations = Activations(Editor(model.graph))
    value = activations.values(neg, operand, signed=signed)
    codes, _, _ = activations.codes(operand, signed=signed)
    assert activations.codes(operand, signed=signed)[0] is codes  # written once
    assert codes.dtype == (ir.DataType.INT8 if signed else ir.DataType.UINT8)
    neg.replace_input_with(0, value)
    Editor(model.graph).sweep()
    model.opset_imports.pop(DOMAIN)
    got = open_session(ir.to_proto(model).SerializeToString()).run(None, {"images": x})[0]
    np.testing.assert_array_equal(-got, operand.grid.values(x))
