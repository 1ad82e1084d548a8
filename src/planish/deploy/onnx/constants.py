"""What no image reaches is computed once, when the file is written.

Two things would otherwise be lost. A weight that is made of weights (standardized, say) could not be stored as codes,
as the exporter leaves larger ones for the runtime to compute. And a product of a table with weights (the position
embedding of Swin V2) would be computed again for every image, in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import Editor, attribute, constant
from planish.deploy.onnx.graph import NODE
from planish.deploy.onnx.grids import read_grid

_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")


def fold_constants(graph: ir.Graph) -> list[str]:
    """Replace computed weights, and products of quantized operands, that depend on no input of the graph.

    Returns:
        The sites of the first quantized operand of every product that was computed.
    """
    editor, of_images = Editor(graph), {id(value) for value in graph.inputs}
    folded = []
    for node in list(graph):  # in the order of execution
        if any(id(value) in of_images for value in node.inputs):
            of_images |= {id(value) for value in node.outputs}
            continue
        source = node.inputs[0] if node.inputs else None
        if node.op_type == NODE and source is not None and constant(source) is None:
            found = _computed(graph, source)
            if found is not None:
                node.replace_input_with(0, editor.constant(found, f"{attribute(node, 'site') or 'weight'}.computed"))
        elif node.op_type in _PRODUCTS and (sites := _quantized(node)):
            found = _computed(graph, node.outputs[0])
            if found is not None:
                editor.replace(node.outputs[0], editor.constant(found, f"{sites[0]}.product"))
                folded.append(sites[0])
    editor.sweep()
    return folded


def _quantized(node: ir.Node) -> list[str]:
    """The sites of the operands of a product that come straight out of quantizers, or through one transpose."""
    sites = []
    for value in node.inputs[:2]:
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Transpose":
            producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
        if producer is not None and producer.op_type == NODE:
            sites.append(str(attribute(producer, "site") or "product"))
    return sites


def _computed(graph: ir.Graph, value: ir.Value) -> np.ndarray | None:
    """The numbers in a value that no image reaches; ``None`` if they are not made of standard operators."""
    wanted: set[int] = set()
    numbers: dict[str, np.ndarray] = {}
    stack = [value]
    while stack:
        one = stack.pop()
        producer, known = one.producer(), constant(one)
        if known is not None:
            numbers[str(one.name)] = known
        elif producer is None or (producer.domain not in ("", "ai.onnx") and producer.op_type != NODE):
            return None
        elif id(producer) not in wanted:
            wanted.add(id(producer))
            stack += [given for given in producer.inputs if given is not None]
    for node in graph:
        if id(node) in wanted:
            numbers |= _run(node, numbers, graph.opset_imports[""])
    return numbers[str(value.name)]


def _run(node: ir.Node, numbers: dict[str, np.ndarray], opset: int) -> dict[str, Any]:
    """The outputs of one node."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    if node.op_type == NODE:
        assert node.inputs[0] is not None
        return {str(node.outputs[0].name): read_grid(node).values(numbers[str(node.inputs[0].name)])}
    names = list(dict.fromkeys(str(value.name) for value in node.inputs if value is not None))
    given = [onnx.numpy_helper.from_array(numbers[name], name) for name in names]
    outputs = [onnx.ValueInfoProto(name=value.name) for value in node.outputs]
    part = onnx.helper.make_graph([ir.to_proto(node)], "part", [], outputs, given)
    model = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", opset)])
    found = ReferenceEvaluator(model).run(None, {})
    return {str(value.name): np.asarray(result) for value, result in zip(node.outputs, found, strict=True)}
