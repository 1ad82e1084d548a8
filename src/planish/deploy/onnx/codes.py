"""The eight-bit codes of activations in a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import Editor
from planish.deploy.onnx.operands import Operand

_Codes = tuple[ir.Value, ir.Value, ir.Value]  # codes, zero point, scale


class Activations:
    """Writes the codes of each quantizer once for each sign, where the quantizer stands."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.written: dict[tuple[int, bool], _Codes] = {}

    def codes(self, operand: Operand, *, signed: bool) -> _Codes:
        """QuantizeLinear and, below eight bits, Clip on the bytes (a clip in float would stay apart from the kernels).

        Unsigned bytes hold signed codes shifted up; signed bytes hold unsigned codes of eight bits shifted down.
        """
        node, grid = operand.node, operand.grid
        key = (id(node), signed)
        if key not in self.written:
            editor, site, like = self.editor, grid.site or node.name or "activation", node.outputs[0]
            shift = (-128 if grid.qmax > 127 else 0) if signed else -grid.qmin
            kind = np.int8 if signed else np.uint8
            dtype = ir.DataType.INT8 if signed else ir.DataType.UINT8
            heads = grid.scale.size > 1  # with one level for zero, which is all that a product asks for
            scale = editor.constant(grid.scale.reshape(-1 if heads else ()), f"{site}.scale")
            level = (grid.zero_point.reshape(-1)[0] + shift).astype(kind)
            zero = editor.constant(level, f"{site}.zero_point")
            levels = editor.constant(np.full(grid.scale.size, level, kind), f"{site}.zero_points") if heads else zero
            inputs = [node.inputs[0], scale, levels]
            value = editor.node(
                node, "QuantizeLinear", inputs, name=f"{site}.quantize", like=like, dtype=dtype,
                attributes={"axis": grid.axis} if heads else {},
            )  # fmt: skip
            ends = (grid.low + shift, grid.high + shift)
            if ends != (np.iinfo(kind).min, np.iinfo(kind).max):
                limits = [editor.constant(np.array(end, dtype=kind), f"{site}.limit") for end in ends]
                value = editor.node(node, "Clip", [value, *limits], name=f"{site}.clip", like=like, dtype=dtype)
            self.written[key] = value, zero, scale
        return self.written[key]

    def moved(self, before: ir.Node, operand: Operand, *, signed: bool) -> tuple[ir.Value, ir.Value]:
        """The codes as the product takes them, and their zero point: bytes are moved, not floats."""
        codes, zero, _ = self.codes(operand, signed=signed)
        for move in operand.moves:
            codes = self.editor.node(
                before, move.op_type, [codes, *move.inputs[1:]], name=f"{operand.grid.site}.{move.op_type.lower()}",
                like=move.outputs[0], dtype=codes.dtype,
                attributes={key: value.value for key, value in move.attributes.items()},
            )  # fmt: skip
        return codes, zero

    def values(self, before: ir.Node, operand: Operand, *, signed: bool) -> ir.Value:
        """The values of the codes, in front of a product that a runtime fuses with them."""
        codes, zero = self.moved(before, operand, signed=signed)
        scale = self.codes(operand, signed=signed)[2]
        like = (operand.moves[-1] if operand.moves else operand.node).outputs[0]
        name = f"{operand.grid.site or 'activation'}.dequantize"
        return self.editor.node(before, "DequantizeLinear", [codes, scale, zero], name=name, like=like)
