"""StatsQ: the scale of a weight is a statistic of it, and nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers.ranges import SMALLEST
from planish.quantizers.trainable import TrainableQuantizer


def statistics_scale(weight: Tensor, channel_axis: int, levels: int) -> Tensor:
    """``2 alpha / levels`` with ``alpha = 2 mean|w|`` over each output channel; broadcasts against the weight."""
    shape = [n if d == channel_axis % weight.dim() else 1 for d, n in enumerate(weight.shape)]
    count = weight.numel() // weight.shape[channel_axis]
    alpha = 2 * weight.detach().float().abs().sum_to_size(shape) / count
    return (2 * alpha / levels).clamp(min=SMALLEST)


def near_threshold(weight: Tensor, grid: Grid, band: float) -> Tensor:
    """Where a weight is within ``band`` steps of the threshold between two levels of its grid."""
    codes = weight.detach().float() / grid.scale - grid.offset + grid.zero_point
    threshold = codes.floor().clamp(grid.qmin, grid.qmax - 1) + 0.5
    return (codes - threshold).abs() <= band


class StatsQuantizer(TrainableQuantizer):
    """StatsQ (Liu et al. 2023, arXiv 2302.02210): levels ``alpha (k + 1/2) / n``, ``k`` from -n to n - 1, n = 2^(b-1).

    ``alpha = 2 mean|w|`` of each output channel is computed anew at every forward pass and gets no gradient; the
    gradient of the weight is the identity everywhere, outside the range too. The levels are the half-integer grid: an
    even number of them, none at zero. For 4 bits and fewer: at 8 bits the clip at alpha dominates the error.

    With a ``band`` the gradient reaches only weights that lie within it of a threshold, in steps of the grid; see
    :class:`planish.qat.annealing.ConfidenceGuidedAnnealing`.
    """

    band: float | None = None

    sharded = False  # it keeps the weight that it saw last

    def initialize(self, x: Tensor, grid: Grid) -> None:
        if not self.format.half_integer:
            raise PlanishError("StatsQ has no level at zero: its format has to be half-integer")
        self.latest = x.detach()

    def _grid(self, weight: Tensor) -> Grid:
        f = self.format
        scale = statistics_scale(weight, self.channel_axis, f.qmax - f.qmin + 1)
        return Grid(scale, torch.zeros_like(scale), f.qmin, f.qmax, f.offset)

    @property
    def grid(self) -> Grid:
        return self._grid(self.latest)

    def forward(self, x: Tensor) -> Tensor:
        self.latest = x.detach()
        grid = self._grid(self.latest)
        rounded = fake_quantize(self.latest, grid)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        moved = x - x.detach()  # zero, and the way of the gradient
        if self.band is not None:
            moved = moved * near_threshold(self.latest, grid, self.band)
        return rounded + moved
