"""A learned step between two learned shifts: OFQ's quantizer of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from planish.functional import Grid
from planish.quantizers.learned import LearnedQuantizer
from planish.quantizers.uniform import UniformQuantizer
from planish.scheme import Format


def _along(shift: Tensor, axis: int) -> Tensor:
    """A vector, made to broadcast along the axis (counted from the end) of what it is added to."""
    return shift.reshape(-1, *(1,) * (-axis - 1))


class ShiftedLearnedQuantizer(LearnedQuantizer):
    """``LSQ(x + b1) + b2`` with a learned ``b1`` and ``b2`` for each feature, both 0 at the start (Liu et al. 2023,
    arXiv 2302.02210, their released code). ``b1`` lifts the small negative tail of GELU into the range.

    Args:
        feature_axis: the axis of the features, counted from the end.
    """

    def __init__(self, format: Format, *, feature_axis: int = -1, **options: Any) -> None:
        super().__init__(format, **options)
        self.feature_axis = feature_axis
        self.before, self.after = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def initialize(self, x: Tensor, grid: Grid) -> None:
        super().initialize(x, grid)
        for shift in (self.before, self.after):
            shift.data = torch.zeros(x.shape[self.feature_axis], device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        before, after = (_along(s, self.feature_axis).to(x.dtype) for s in (self.before, self.after))
        return super().forward(x + before) + after

    def baked(self) -> ShiftedQuantizer:
        tap = ShiftedQuantizer(self.format, channel_axis=self.channel_axis)
        tap.grid = self.grid
        tap.before, tap.after = (
            _along(shift.detach(), self.feature_axis).clone() for shift in (self.before, self.after)
        )
        return tap


class ShiftedQuantizer(UniformQuantizer):
    """A grid between two fixed shifts, which broadcast against the tensor: ``Q(x + before) + after``."""

    before: Tensor
    after: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0) -> None:
        super().__init__(format, channel_axis=channel_axis)
        self.register_buffer("before", torch.zeros(1))
        self.register_buffer("after", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.before.to(x.dtype)) + self.after.to(x.dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("before", "after"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.empty_like(stored, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)
