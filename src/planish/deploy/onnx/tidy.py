"""Exact simplifications of a graph with ``FakeQuantize`` nodes: what keeps a quantizer away from its product goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.constants import fold_constants
from planish.deploy.onnx.edit import Editor, attribute, constant, only_user
from planish.deploy.onnx.einsum import spell_out_einsums
from planish.deploy.onnx.graph import NODE
from planish.deploy.onnx.grids import read_grid

# nodes that put numbers elsewhere and change none
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def quantizers(graph: ir.Graph) -> list[ir.Node]:
    """The ``FakeQuantize`` nodes, in the order of execution."""
    return [node for node in graph if node.op_type == NODE]


def tidy(graph: ir.Graph) -> list[str]:
    """Everything below, in an order in which each step finds what the one before has laid open.

    Returns:
        The sites of the products that no image reaches, whose results are in the file now.
    """
    forget_origins(graph)
    folded = fold_constants(graph)
    drop_identity_norms(graph)
    spell_out_gemm(graph)
    spell_out_einsums(graph)
    merge_equal(graph)
    while take_in_activations(graph) or before_pooling(graph) or before_moves(graph):
        merge_equal(graph)
    Editor(graph).sweep()
    return folded


def forget_origins(graph: ir.Graph) -> None:
    """Take out what the exporter notes at each node: stack traces with the paths of this machine, larger than codes."""
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None


def drop_identity_norms(graph: ir.Graph) -> None:
    """Take out BatchNorms that compute nothing, as folding leaves them."""
    editor = Editor(graph)
    for node in [node for node in graph if node.op_type == "BatchNormalization"]:
        values = [constant(value) for value in node.inputs[1:5]]
        if any(value is None for value in values):
            continue
        scale, bias, mean, var = (np.asarray(value, dtype=np.float64) for value in values)
        factor = scale / np.sqrt(var + attribute(node, "epsilon", 1e-5))
        # as far as float32 can say: a variance of 1 - epsilon is itself rounded
        if np.allclose(factor, 1, rtol=0, atol=1.2e-7) and not np.any(bias) and not np.any(mean):
            assert node.inputs[0] is not None
            editor.replace(node.outputs[0], node.inputs[0])
            editor.remove(node)


def spell_out_gemm(graph: ir.Graph) -> None:
    """``Gemm`` as a product and a sum, for which runtimes have integer kernels with a float output."""
    editor = Editor(graph)
    for node in [node for node in graph if node.op_type == "Gemm"]:
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            continue
        name, (a, b, *rest) = node.name or "gemm", node.inputs
        if attribute(node, "transB", 0):
            b = editor.node(
                node, "Transpose", [b], name=f"{name}.weight", dtype=ir.DataType.FLOAT, attributes={"perm": [1, 0]}
            )
        out = editor.node(node, "MatMul", [a, b], name=name, like=node.outputs[0])
        if rest and rest[0] is not None:
            out = editor.node(node, "Add", [out, rest[0]], name=f"{name}.bias", like=node.outputs[0])
        editor.replace(node.outputs[0], out)
        editor.remove(node)


def merge_equal(graph: ir.Graph) -> None:
    """One quantizer where several put the same tensor on the same grid."""
    editor = Editor(graph)
    seen: dict[Any, ir.Node] = {}
    for node in quantizers(graph):
        key = (id(node.inputs[0]), read_grid(node).key())
        first = seen.setdefault(key, node)
        if first is not node:
            editor.replace(node.outputs[0], first.outputs[0])
            editor.remove(node)


def _readers(value: ir.Value) -> list[ir.Node]:
    """The quantizers that read a value, if nothing else does; else nothing."""
    users = [node for node, _ in value.uses()]
    return users if users and not value.is_graph_output() and all(n.op_type == NODE for n in users) else []


def take_in_activations(graph: ir.Graph) -> bool:
    """A ReLU, ReLU6 or clip in front of quantizers becomes their smallest and largest code.

    Rounding is monotone: Q(min(max(x, 0), t)) = min(max(Q(x), Q(0)), Q(t)).
    """
    changed = False
    editor = Editor(graph)
    for node in [node for node in graph if node.op_type in ("Relu", "Clip")]:
        readers = _readers(node.outputs[0])
        ends = _ends(node)
        if not readers or ends is None or not all(read_grid(reader).per_tensor for reader in readers):
            continue
        for reader in readers:
            read_grid(reader).limited(*ends).write(reader)
        editor.replace(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
        editor.remove(node)
        changed = True
    return changed


def _ends(node: ir.Node) -> tuple[float | None, float | None] | None:
    """Between which values a node leaves its input alone; ``None`` if they are computed."""
    if node.op_type == "Relu":
        return 0.0, None
    ends: list[float | None] = [None, None]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            found = constant(value)
            if found is None:
                return None
            ends[i] = float(found)
    return ends[0], ends[1]


def before_pooling(graph: ir.Graph) -> bool:
    """Max pooling of codes for codes of a max pooling: the same numbers, one byte each."""
    return _swap(graph, ("MaxPool",))


def before_moves(graph: ir.Graph) -> bool:
    """Move one byte instead of four: quantize in front of what only moves numbers about."""
    return _swap(graph, MOVES)


def _swap(graph: ir.Graph, kinds: tuple[str, ...]) -> bool:
    editor = Editor(graph)
    changed = False
    for node in [node for node in graph if node.op_type in kinds and len(node.outputs) == 1]:
        source = node.inputs[0]
        reader = only_user(node.outputs[0])
        if source is None or reader is None or reader.op_type != NODE or constant(source) is not None:
            continue
        if not read_grid(reader).per_tensor:
            continue
        moved = ir.node(
            NODE, [source, *reader.inputs[1:]], {k: v.value for k, v in reader.attributes.items()},
            domain=reader.domain, name=reader.name,
        )  # fmt: skip
        out = moved.outputs[0]
        out.name, out.shape, out.type = editor.name(f"{reader.name}.out"), source.shape, source.type
        graph.insert_before(node, moved)
        node.replace_input_with(0, out)
        editor.replace(reader.outputs[0], node.outputs[0])
        graph.remove(reader, safe=True)
        changed = True
    return changed
