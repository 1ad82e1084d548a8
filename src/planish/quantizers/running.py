"""Ranges of activations over several batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid
from planish.quantizers.ranges import SAMPLE, fit_rows, grid_of_range, row_extremes, rows_of, sample_size, subsample
from planish.scheme import Format


class RunningRange(nn.Module):
    """Watches an activation over several batches and then gives its grid.

    >>> watcher = RunningRange(Format(4, symmetric=False, observer="mse"))
    >>> for batch in batches: watcher.observe(batch)
    >>> grid = watcher.grid()

    Observer "minmax" uses exponential moving averages of each batch's extremes, m <- momentum * m + (1 - momentum) *
    batch (Jacob et al. 2018, arXiv:1712.05877, section 3.1), started at the first batch. The others use a reservoir:
    a seeded uniform sample of at most `capacity` values over all batches (several rows: at least 1024 of each), beside
    the true extremes; a batch weighs by its values, counted up to `capacity`. The sample depends only on the order of
    the batches and the seed. `forward` observes and returns its input, so that the module can stand in a hook's place.
    """

    low: Tensor  # (R,) moving averages of the extremes
    high: Tensor
    least: Tensor  # (R,) extremes over all batches
    most: Tensor
    sample: Tensor  # (R, n)
    keys: Tensor  # (n,) in the order of the sample's columns

    def __init__(
        self, format: Format, *, channel_axis: int = 0, momentum: float = 0.9, capacity: int = SAMPLE, seed: int = 0
    ) -> None:
        super().__init__()
        if format.granularity == "group":
            raise PlanishError("running ranges are per tensor, channel or token: fit a group-wise grid with fit_grid.")
        if not 0 <= momentum < 1:
            raise PlanishError(f"momentum is {momentum}: the weight of earlier batches is at least 0 and below 1.")
        self.format, self.channel_axis, self.momentum, self.capacity = format, channel_axis, momentum, capacity
        for name in ("low", "high", "least", "most", "sample", "keys"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.batches = 0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take one batch in; it must have as many channels or tokens as the batches before it.

        Raises:
            PlanishError: x holds NaN or infinity, is empty, or does not fit the granularity or the earlier batches.
        """
        rows = rows_of(x.detach(), self.format, self.channel_axis)
        if self.batches and rows.values.shape[0] != len(self.low):
            raise PlanishError(
                f"a batch of shape {tuple(x.shape)} has {rows.values.shape[0]} {self.format.granularity} rows, earlier "
                f"batches had {len(self.low)}: static scales need the same number each time."
            )
        low, high = row_extremes(rows.values)
        if not self.batches:
            self.low, self.high, self.least, self.most = low, high, low, high
        else:
            self.low, self.high = low.lerp(self.low, self.momentum), high.lerp(self.high, self.momentum)
            self.least, self.most = torch.minimum(low, self.least), torch.maximum(high, self.most)
        if self.format.observer != "minmax":
            self._keep(subsample(rows.values, sample_size(len(low), self.capacity)))
        self._restore = rows.restore
        self.batches += 1

    def _keep(self, values: Tensor) -> None:
        """Reservoir by random keys: the columns with the smallest keys of all seen are a uniform sample of them."""
        keys = torch.rand(values.shape[1], generator=self._generator).to(values.device)
        if self.batches:
            values, keys = torch.cat([self.sample, values], dim=1), torch.cat([self.keys, keys])
        else:
            values = values.clone()  # the network may go on to work in place on what they are a view of
        room = max(1, sample_size(values.shape[0], self.capacity) // values.shape[0])
        if len(keys) > room:
            kept = keys.topk(room, largest=False, sorted=False).indices
            values, keys = values[:, kept], keys[kept]
        self.sample, self.keys = values, keys

    @torch.no_grad()
    def grid(self) -> Grid:
        """The grid for what was observed; broadcasts against tensors of the shape of the last batch."""
        if not self.batches:
            raise PlanishError("no batch was observed yet: run calibration data through the network first.")
        if self.format.observer == "minmax":
            scale, zero_point = grid_of_range(self.low, self.high, self.format)
        else:
            scale, zero_point = fit_rows(self.sample, self.least, self.most, self.format)
        return Grid(
            self._restore(scale), self._restore(zero_point), self.format.qmin, self.format.qmax, self.format.offset
        )

    def forward(self, x: Tensor) -> Tensor:
        self.observe(x)
        return x
