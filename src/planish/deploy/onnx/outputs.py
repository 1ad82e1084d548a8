"""Eight-bit grids on the outputs that a convolution would otherwise have to give in float.

A stock integer convolution gives bytes, not floats. Where the output of a convolution goes into a sum or a nonlinear
function before it is quantized, exact semantics cost the slower ConvInteger. With these grids the sums of a residual
network run on bytes, too. They are a change of the network, small and measured: the report says how small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.card import INPUT
from planish.deploy.onnx.edit import Editor, only_user
from planish.deploy.onnx.graph import DOMAIN, NODE
from planish.deploy.onnx.grids import read_grid
from planish.deploy.onnx.operands import obstacle, operand_of
from planish.deploy.onnx.runtime import open_session
from planish.errors import PlanishError

ACTIVATIONS = ("Relu", "Clip")
OWN = "planish_output"  # attribute of the quantizers that are made here


def open_outputs(graph: ir.Graph) -> list[ir.Value]:
    """The tensors that get a grid: float outputs of quantized convolutions and of the sums that they go into."""
    found: list[ir.Value] = []
    for node in graph:
        if node.op_type == "Conv":
            wanted = not obstacle(node, operand_of(node.inputs[0]), operand_of(node.inputs[1]))
        else:
            wanted = node.op_type == "Add" and _residual(node, found)
        if not wanted:
            continue
        value = node.outputs[0]
        user = only_user(value)
        if user is not None and user.op_type in ACTIVATIONS:
            value = user.outputs[0]
            user = only_user(value)
        if (user is None or user.op_type != NODE) and not value.is_graph_output():
            found.append(value)
    return found


def _residual(node: ir.Node, found: list[ir.Value]) -> bool:
    """A sum of which one addend has a grid and the other one comes from such a tensor by pooling alone."""

    def known(value: ir.Value | None) -> bool:
        while value is not None and value not in found:
            producer = value.producer()
            if producer is None or producer.op_type not in ("MaxPool", "Identity"):
                return False
            value = producer.inputs[0]
        return value is not None

    return all(known(value) for value in node.inputs)


def ranges(model: Any, values: list[ir.Value], images: Iterable[np.ndarray]) -> list[tuple[float, float]]:
    """Smallest and largest number of each tensor over the images, zero included, in float with all quantizers on."""
    from planish.deploy.onnx.lower import Lowering

    names = [value.name for value in values]
    probe = model.clone()
    by_name = {value.name: value for node in probe.graph for value in node.outputs}
    probe.graph.outputs.extend(by_name[name] for name in names)
    Lowering(probe.graph, in_float=True).run()
    probe.opset_imports.pop(DOMAIN, None)
    session = open_session(ir.to_proto(probe).SerializeToString())
    ends: list[tuple[float, float]] = [(0.0, 0.0)] * len(values)
    batch = None
    for batch in images:
        got = session.run(names, {INPUT: batch})
        ends = [(min(low, float(x.min())), max(high, float(x.max()))) for (low, high), x in zip(ends, got, strict=True)]
    if batch is None:
        raise PlanishError("there are no calibration images to set the grids of output_bits on")
    return ends


def add_output_grids(model: Any, images: Iterable[np.ndarray], bits: int = 8) -> int:
    """Put the grids into the graph of ``model``; returns how many."""
    graph = model.graph
    values = open_outputs(graph)
    if not values:
        return 0
    editor = Editor(graph)
    for value, (low, high) in zip(values, ranges(model, values, images), strict=True):
        producer = value.producer()
        assert producer is not None
        scale = np.float32((high - low) / (2**bits - 1) or 1.0)  # a tensor of zeros has any grid
        zero = np.float32(np.rint(-low / scale))
        inputs = [value, editor.constant(scale, "output.scale"), editor.constant(zero, "output.zero_point")]
        attributes = {
            "qmin": 0, "qmax": 2**bits - 1, "offset": 0.0, "granularity": "tensor", "axis": -1, "group_size": 0,
            "site": f"{value.name}.output", OWN: 1,
        }  # fmt: skip
        node = ir.node(NODE, inputs, attributes, domain=DOMAIN, name=editor.name(f"{value.name}.output"))
        out = node.outputs[0]
        out.name, out.shape, out.type = editor.name(f"{value.name}.on_grid"), value.shape, value.type
        graph.insert_after(producer, node)
        for user, index in list(value.uses()):
            if user is not node:
                user.replace_input_with(index, out)
    return len(values)


def is_own(node: ir.Node) -> bool:
    """Whether a quantizer was made here."""
    return node.op_type == NODE and OWN in node.attributes and read_grid(node).per_tensor
