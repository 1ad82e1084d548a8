"""PACT: an activation's clipping level is a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid
from planish.quantizers.learned import pass_between, round_to_grid
from planish.quantizers.ranges import SMALLEST
from planish.quantizers.trainable import TrainableQuantizer
from planish.scheme import Format


class _ClipAndRound(torch.autograd.Function):
    """Round to a grid that ends at alpha, or nearly so (signed); the gradient is that of clipping to [-alpha, alpha] or
    [0, alpha], and alpha receives what was clipped off (PACT, equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, signed: bool, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = signed
        return round_to_grid(x, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, alpha = ctx.saved_tensors
        passed = pass_between(gradient, x, -alpha if ctx.signed else torch.zeros_like(alpha), alpha)
        ends = x.sign()  # which end a value that was clipped went to; the lower one is fixed if alpha is the only one
        if not ctx.signed:
            ends.clamp_(min=0)
        to_alpha = torch.dot((gradient - passed).float().reshape(-1), ends.float().reshape(-1))
        return passed, to_alpha.reshape(alpha.shape), None, None


class PACTQuantizer(TrainableQuantizer):
    """PACT (Choi et al. 2018, arXiv 1805.06085): clip at a learned ``alpha``, then round to a uniform grid.

    For inputs that are never negative the range is [0, alpha], as in the paper. It has none for others: here they are
    clipped at -alpha and alpha as far as gradients go, and rounded to levels ``2 alpha / (2^b - 1)`` apart of which one
    is zero, so that the lowest lies half a step below -alpha and the highest half a step below alpha. The format has
    one scale for the tensor. ``alpha`` starts at ``start``, or at the end of the calibrated range if that
    is None (the paper starts at 10 and trains from scratch; a trained network would first have to come down from it).
    """

    signed: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0, start: float | None = None) -> None:
        super().__init__(format, channel_axis=channel_axis)
        if start is not None and start <= 0:
            raise PlanishError(f"PACT's clipping level starts at {start}: it is positive")
        self.start = start
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def initialize(self, x: Tensor, grid: Grid) -> None:
        if grid.scale.numel() != 1:
            raise PlanishError("PACT has one clipping level for the whole tensor: use granularity tensor")
        self.signed.fill_(bool((x < 0).any()))
        ends = torch.tensor([grid.qmin, grid.qmax], device=grid.scale.device) - grid.zero_point
        widest = (ends.abs().max() if self.signed else ends.max()) * grid.scale
        self.alpha.data = (widest if self.start is None else torch.full_like(widest, self.start)).float().reshape(())

    @property
    def grid(self) -> Grid:
        f, alpha = self.format, self.alpha.detach().clamp(min=SMALLEST)
        levels = f.qmax - f.qmin
        middle = (levels + 1) // 2 + f.qmin
        scale = torch.where(self.signed, 2 * alpha / levels, alpha / levels)
        return Grid(scale, torch.where(self.signed, float(middle), float(f.qmin)), f.qmin, f.qmax, f.offset)

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = _ClipAndRound.apply(x, self.alpha, bool(self.signed), self.grid)
        return rounded

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.alpha.clamp_(min=SMALLEST)
