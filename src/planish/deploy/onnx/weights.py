"""The integers of a weight, and how a file holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import Editor
from planish.deploy.onnx.grids import NodeGrid


@dataclass(frozen=True)
class WeightCodes:
    """Integers ``codes`` and the float32 ``scale`` of one (size 1) or of each output channel.

    The weight is codes times scale. A half-integer grid, (q + 1/2) s, is held as 2 q + 1 with the scale s / 2.
    ``stored`` are the codes q in [-2^(b-1), 2^(b-1)) that the file holds; codes = multiplier * stored + addend.
    ``axis`` is that of the output channels, ``None`` if the scales run along the inputs.
    """

    site: str
    stored: np.ndarray
    bits: int
    scale: np.ndarray
    axis: int | None
    symmetric: bool
    multiplier: int = 1
    addend: int = 0

    @property
    def codes(self) -> np.ndarray:
        return self.multiplier * self.stored.astype(np.int32) + self.addend

    @staticmethod
    def of(values: np.ndarray, grid: NodeGrid, permutation: list[int] | None = None) -> WeightCodes:
        """The codes of a latent weight; ``permutation``: how the graph turns it before the product."""
        q = grid.codes(values)
        half = grid.offset != 0
        scale = (grid.scale / 2 if half else grid.scale).astype(np.float32)
        axis: int | None = grid.axis if grid.granularity == "channel" and scale.size > 1 else 0
        if grid.granularity in ("group", "token") and scale.size > 1:
            axis = None
        if permutation is not None:
            q = q.transpose(permutation)
            axis = None if axis is None else list(permutation).index(axis)
        symmetric = not np.any(grid.zero_point) and grid.signed
        # codes of up to b bits; a width that ONNX has no type for takes the next one
        bits = (grid.qmax - grid.qmin).bit_length()
        return WeightCodes(
            grid.site, q.astype(np.int8 if symmetric else np.int16), bits, scale.reshape(-1), axis, symmetric,
            2 if half else 1, 1 if half else 0,
        )  # fmt: skip

    def factor(self, span: int) -> int:
        """The largest power of two that the codes can be multiplied with.

        They have to stay in a signed byte, and a sum of two products with inputs in [0, span] in 16 signed bits:
        kernels for processors without dot-product instructions add in pairs and saturate.
        """
        high, low = int(self.codes.max(initial=0)), int(-self.codes.min(initial=0))
        factor = 1
        while (2 * factor * high <= 127 and 2 * factor * low <= 128) and 4 * factor * max(high, low) * span <= 32767:
            factor *= 2
            if factor > 128:  # a weight of zeros
                return 1
        return factor

    def with_scale(self, scale: np.ndarray, factor: int) -> WeightCodes:
        """The codes times ``factor`` with another scale."""
        return replace(self, scale=scale, multiplier=self.multiplier * factor, addend=self.addend * factor)

    def reach(self, grid: NodeGrid) -> np.ndarray:
        """(channels, 2): the smallest and the largest sum that inputs on ``grid`` can give; output channels first."""
        zero = float(grid.zero_point.reshape(-1)[0])
        low, high = min(grid.low - zero, 0.0), max(grid.high - zero, 0.0)  # zero: the padding
        codes = self.codes.reshape(len(self.codes), -1).astype(np.float64)
        up, down = np.maximum(codes, 0).sum(1), np.minimum(codes, 0).sum(1)
        return np.stack([up * low + down * high, up * high + down * low], axis=1)


def weight_values(
    editor: Editor, before: ir.Node, weight: WeightCodes, layout: str, *, unsigned: bool
) -> tuple[ir.Value, int, bool]:
    """Bytes in the graph (``unsigned``: shifted up by 128), the size in the file, and whether it is stored narrow.

    With the layout "fast" they are stored so. With "small" they are stored at their true width (INT2, INT4; 3 bits in
    INT4) and a Cast, which runtimes fold when they load the file, widens them.
    """
    wide, shift = (ir.DataType.UINT8, 128) if unsigned else (ir.DataType.INT8, 0)
    if layout == "fast" or weight.bits > 4:
        array = (weight.codes + shift).astype(np.uint8 if unsigned else np.int8)
        return editor.constant(array, f"{weight.site}.codes"), array.size, False
    narrow = ml_dtypes.int2 if weight.bits == 2 else ml_dtypes.int4
    value = editor.constant(weight.stored.astype(narrow), f"{weight.site}.codes")
    shape = value
    steps = [("Mul", weight.multiplier, 1), ("Add", weight.addend + shift, 0)]
    kinds = [wide] if all(number == idle for _, number, idle in steps) else [ir.DataType.INT32, wide]
    for kind in kinds:
        name = f"{weight.site}.{kind.name.lower()}"
        value = editor.node(before, "Cast", [value], name=name, like=shape, dtype=kind, attributes={"to": kind})
        for op, number, idle in steps if kind == ir.DataType.INT32 else ():
            if number != idle:
                inputs = [value, editor.constant(np.array(number, np.int32), op.lower())]
                name = f"{weight.site}.{op.lower()}"
                value = editor.node(before, op, inputs, name=name, like=shape, dtype=kind)
    return value, -(-weight.stored.size * (2 if weight.bits == 2 else 4) // 8), True
