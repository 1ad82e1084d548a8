"""What half precision holds exactly is stored in it: biases, norms, position embeddings, scales.

In float32 they are a tenth of the file of a small 4-bit transformer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import Editor, constant
from planish.network.half import LEAST


def store_half(graph: ir.Graph) -> None:
    """Store so each constant that loses nothing by it; a Cast, which is folded when the file is loaded, widens it."""
    editor = Editor(graph)
    first = next(iter(graph))
    for value in list(graph.initializers.values()):
        numbers = constant(value)
        if numbers is None or numbers.dtype != np.float32 or numbers.size < LEAST or value in graph.outputs:
            continue
        with np.errstate(over="ignore"):
            narrow = numbers.astype(np.float16)
        if not np.array_equal(narrow.astype(np.float32), numbers):
            continue
        name, users = str(value.name), list(value.uses())
        stored = editor.constant(narrow, f"{name}.half")
        attributes = {"to": ir.DataType.FLOAT}
        wide = editor.node(
            first, "Cast", [stored], name=f"{name}.cast", like=value, dtype=ir.DataType.FLOAT, attributes=attributes
        )
        for node, index in users:
            node.replace_input_with(index, wide)
    editor.sweep()
