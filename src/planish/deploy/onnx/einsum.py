"""Sums over products (``Einsum``) as matrix products, for which runtimes have integer kernels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from planish.deploy.onnx.edit import Editor, attribute, constant


def spell_out_einsums(graph: ir.Graph) -> None:
    """``Einsum`` of two operands as transposes around one ``MatMul``, where that takes no reshaping.

    With one label summed over, one that only the second operand has, and the first with at least one of its own,
    ``byhwc,hkc->byhwk`` is a product of (b, y, h, w, c) with (h, c, k). The operands change places where that helps, or
    where it makes a weight the second one.
    """
    editor = Editor(graph)
    for node in [node for node in graph if node.op_type == "Einsum" and len(node.inputs) == 2]:
        left, right, out = _labels(node)
        order = [0, 1] if _weight(node.inputs[1]) or not _weight(node.inputs[0]) else [1, 0]
        for first, second in (order, order[::-1]):
            plan = _plan((left, right)[first], (left, right)[second], out)
            if plan is not None:
                _write(editor, node, node.inputs[first], node.inputs[second], *plan)
                break


def _labels(node: ir.Node) -> tuple[str, str, str]:
    """The three terms of an equation; without an output the labels that occur once, in the order of the alphabet."""
    terms, _, out = str(attribute(node, "equation")).replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    return left, right, out or "".join(sorted(x for x in set(left + right) if (left + right).count(x) == 1))


def _weight(value: Any) -> bool:
    """Whether an operand is a quantized weight."""
    producer = None if value is None else value.producer()
    return producer is not None and bool(producer.inputs) and constant(producer.inputs[0]) is not None


def _plan(left: str, right: str, out: str) -> tuple[list[int], list[int], list[int]] | None:
    """How to permute the first operand, the second one and the product; ``None`` if that is not enough."""
    if "." in left + right or any(len(set(term)) != len(term) for term in (left, right, out)):
        return None
    shared = [x for x in out if x in left and x in right]
    own = [x for x in out if x in left and x not in right]
    new = [x for x in right if x not in left]
    summed = [x for x in left if x in right and x not in out]
    if len(summed) != 1 or len(new) != 1 or not own or set(out) != {*shared, *own, *new}:
        return None
    if {*left} != {*shared, *own, *summed} or {*right} != {*shared, *new, *summed}:
        return None
    first, second = [*own[:-1], *shared, own[-1], *summed], [*shared, *summed, *new]
    made = [*own[:-1], *shared, own[-1], *new]
    return [left.index(x) for x in first], [right.index(x) for x in second], [made.index(x) for x in out]


def _write(
    editor: Editor, node: ir.Node, left: Any, right: Any, first: list[int], second: list[int], last: list[int]
) -> None:
    name, old = node.name or "einsum", node.outputs[0]
    operands = [_moved(editor, node, value, perm, name) for value, perm in ((left, first), (right, second))]
    made = editor.node(node, "MatMul", operands, name=name, dtype=ir.DataType.FLOAT)
    if old.shape is not None:
        sides: list[Any] = [None] * len(last)
        for place, side in zip(last, old.shape, strict=True):
            sides[place] = side
        made.shape = ir.Shape(sides)
    editor.replace(old, _moved(editor, node, made, last, name, like=old))
    editor.remove(node)


def _moved(editor: Editor, before: ir.Node, value: Any, perm: list[int], name: str, like: Any = None) -> Any:
    if perm == sorted(perm):
        return value
    made = editor.node(before, "Transpose", [value], name=f"{name}.transpose", like=like, attributes={"perm": perm})
    if like is None:
        made.type = ir.TensorType(ir.DataType.FLOAT)
        made.shape = None if value.shape is None else ir.Shape([value.shape[i] for i in perm])
    return made
