"""A module that holds a uniform grid and fake-quantizes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers.ranges import fit_grid
from planish.scheme import Format


class UniformQuantizer(nn.Module):
    """Fake quantization on a grid that `fit` has set (or that was assigned to `.grid`, or loaded).

    >>> quantizer = UniformQuantizer(Format(4, "channel")).fit(layer.weight)
    >>> quantizer(layer.weight)          # the nearest grid values; straight-through gradient

    Buffers (persistent, always float32, also after `.half()`): `scale` and `zero_point`, empty until fitted. A state
    dict of a fitted quantizer loads into a fresh one of the same format.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0) -> None:
        super().__init__()
        self.format = format
        self.channel_axis = channel_axis
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))

    @property
    def fitted(self) -> bool:
        """Whether a grid is set."""
        return self.scale.numel() > 0

    @property
    def grid(self) -> Grid:
        """The grid; a PlanishError before one is set."""
        if not self.fitted:
            raise PlanishError(
                "this quantizer has no grid yet: call fit(x) with calibration data, or load a state dict."
            )
        return Grid(self.scale, self.zero_point, self.format.qmin, self.format.qmax, self.format.offset)

    @grid.setter
    def grid(self, grid: Grid) -> None:
        expected = (self.format.qmin, self.format.qmax, self.format.offset)
        if (grid.qmin, grid.qmax, grid.offset) != expected:
            raise PlanishError(
                f"grid has (qmin, qmax, offset) {(grid.qmin, grid.qmax, grid.offset)}, but this quantizer's format "
                f"({self.format.describe()}) needs {expected}: fit the grid with the same format."
            )
        problem = _scale_problem(grid.scale)
        if problem:
            raise PlanishError(problem)
        self.scale = grid.scale.detach().float().clone()
        self.zero_point = grid.zero_point.detach().float().clone()

    def fit(self, x: Tensor) -> UniformQuantizer:
        """Set the grid from the values of `x` by the format's observer (see `fit_grid`); returns the module itself."""
        self.grid = fit_grid(x, self.format, channel_axis=self.channel_axis)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Nearest grid value of each element, in the dtype of x."""
        return fake_quantize(x, self.grid)

    def extra_repr(self) -> str:
        kind = "half-integer" if self.format.half_integer else "symmetric" if self.format.symmetric else "affine"
        count = self.scale.numel() // (self.format.group_size if self.format.granularity == "group" else 1)
        scales = f"{count} scale{'' if count == 1 else 's'}" if self.fitted else "not fitted"
        return f"{self.format.bits} bits {self.format.granularity} {kind}, {scales}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UniformQuantizer:
        """Follow moves between devices but not changes of dtype: a scale rounded to half precision is another grid."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in ("scale", "zero_point"):
            stored = state_dict.get(prefix + name)
            if stored is None:
                continue
            if name == "scale" and stored.numel() and (problem := _scale_problem(stored)):
                error_msgs.append(f"{prefix}{name}: {problem}")
            # The shape before fitting says nothing: take the one in the file, so that the copy below fits.
            if stored.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty(stored.shape, device=getattr(self, name).device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _scale_problem(scale: Tensor) -> str | None:
    """One sentence if a scale is not positive and finite, else None."""
    if scale.is_meta:
        return None
    bad = int((~(torch.isfinite(scale) & (scale > 0))).sum())
    return f"{bad} of {scale.numel()} scales are not positive and finite: fit the grid again." if bad else None
