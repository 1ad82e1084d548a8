"""The grid of a ``FakeQuantize`` node, in numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import attribute, constant


@dataclass(frozen=True)
class NodeGrid:
    """What a ``FakeQuantize`` node does to its input: see :class:`planish.functional.Grid`.

    ``low`` and ``high`` are the codes between which its values stay: ``qmin`` and ``qmax``, or less where an activation
    function in front of it has been taken in.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    offset: float
    granularity: str
    axis: int
    group_size: int
    site: str
    low: int
    high: int

    @property
    def per_tensor(self) -> bool:
        return self.scale.size == 1 and self.offset == 0

    @property
    def signed(self) -> bool:
        return self.qmin < 0

    def key(self) -> tuple[Any, ...]:
        """Equal for equal grids."""
        return (
            self.scale.tobytes(), self.zero_point.tobytes(), self.scale.shape, self.qmin, self.qmax, self.offset,
            self.axis if self.scale.size > 1 else None, self.low, self.high,
        )  # fmt: skip

    def codes(self, x: np.ndarray) -> np.ndarray:
        """Codes of ``x`` as :func:`planish.functional.quantize` gives them, in float32."""
        steps = x.astype(np.float32) / self.scale
        if self.offset:
            steps = steps - np.float32(self.offset)
        return np.clip(np.rint(steps) + self.zero_point, self.low, self.high)

    def values(self, x: np.ndarray) -> np.ndarray:
        """The nearest grid values of ``x``, float32."""
        steps = self.codes(x) - self.zero_point + np.float32(self.offset)
        return np.asarray(steps * self.scale, dtype=np.float32)

    def limited(self, low: float | None, high: float | None) -> NodeGrid:
        """The grid behind a clip to [low, high] (a per-tensor grid)."""
        grid = self
        if low is not None:
            grid = replace(grid, low=max(grid.low, int(grid.codes(np.array(low, np.float32)).item())))
        if high is not None:
            grid = replace(grid, high=min(grid.high, int(grid.codes(np.array(high, np.float32)).item())))
        return grid

    def write(self, node: ir.Node) -> None:
        """Note the limits at the node."""
        for name, value in (("low", self.low), ("high", self.high)):
            node.attributes[name] = ir.AttrInt64(name, value)


def read_grid(node: ir.Node) -> NodeGrid:
    """The grid of a ``FakeQuantize`` node."""
    scale, zero_point = (np.asarray(constant(value), dtype=np.float32) for value in node.inputs[1:3])
    qmin, qmax = int(attribute(node, "qmin")), int(attribute(node, "qmax"))
    return NodeGrid(
        scale, zero_point, qmin, qmax, float(attribute(node, "offset", 0.0)), attribute(node, "granularity", "tensor"),
        int(attribute(node, "axis", 0)), int(attribute(node, "group_size", 0)), attribute(node, "site", ""),
        int(attribute(node, "low", qmin)), int(attribute(node, "high", qmax)),
    )  # fmt: skip
