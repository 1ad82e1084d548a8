"""Small tools for editing an ONNX graph held by ``onnx_ir``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir


def constant(value: Any) -> np.ndarray | None:
    """The values of a constant or an initializer; ``None`` if it is computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute of a node, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


class Editor:
    """Adds nodes and constants to a graph under names that are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
        self.names |= {value.name for value in graph.inputs}
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def name(self, wanted: str) -> str:
        """``wanted``, or with the first number behind it that makes it free."""
        name, count = wanted, 1
        while name in self.names:
            name, count = f"{wanted}_{count}", count + 1
        self.names.add(name)
        return name

    def constant(self, array: Any, name: str) -> ir.Value:
        """An initializer; equal ones are stored once."""
        array = np.asarray(array, order="C")
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            tensor = ir.Tensor(array, name=self.name(name))
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.constants[key] = value
        return self.constants[key]

    def node(
        self, before: ir.Node, op_type: str, inputs: list[Any], *, name: str, like: Any = None, dtype: Any = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:  # fmt: skip
        """Insert a node in front of another one; its output, with the shape of ``like`` and the type ``dtype``."""
        made = ir.node(op_type, inputs, attributes or {}, name=self.name(name))
        out = made.outputs[0]
        out.name = self.name(f"{made.name}.out")
        if like is not None:
            out.shape = like.shape
        if dtype is not None or like is not None:
            out.type = ir.TensorType(dtype) if dtype is not None else like.type
        self.graph.insert_before(before, made)
        return out

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Everything that read ``old`` reads ``new``; a graph output keeps its name."""
        outputs = self.graph.outputs
        for index, value in enumerate(outputs):
            if value is old:
                old.name, new.name = f"{old.name}.before", old.name
                outputs[index] = new
        old.replace_all_uses_with(new)

    def remove(self, node: ir.Node) -> None:
        """Take out a node whose outputs nobody reads any more, and what only it needed."""
        stack = [node]
        while stack:
            one = stack.pop()
            if one.graph is None or any(v.uses() or v in self.graph.outputs for v in one.outputs):
                continue
            inputs = [value for value in one.inputs if value is not None]
            self.graph.remove(one, safe=True)
            stack += [producer for value in inputs if (producer := value.producer()) is not None and not value.uses()]

    def sweep(self) -> None:
        """Take out all nodes and initializers that do not lead to an output."""
        for node in reversed(list(self.graph)):
            self.remove(node)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if exactly one does and it is no output of the graph."""
    users = {id(node): node for node, _ in value.uses()}
    return next(iter(users.values())) if len(users) == 1 and not value.is_graph_output() else None
