"""The learned step size (LSQ) and the learned zero point beside it (LSQ+)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers.ranges import SMALLEST
from planish.quantizers.trainable import TrainableQuantizer
from planish.scheme import Format

FLOOR = 0.01  # a scale never falls below this share of what it was at the start, so that no layer dies


def round_to_grid(x: Tensor, grid: Grid) -> Tensor:
    """``fake_quantize`` where no gradient is asked for, with one new tensor only."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    steps = torch.div(wide, grid.scale)
    if grid.offset:
        steps.sub_(grid.offset)
    steps.round_()
    # clamping the code plus its zero point is clamping the code to shifted limits: one pass less
    low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
    if _as_numbers(grid.zero_point):
        steps.clamp_(low.item(), high.item())
    else:
        steps.clamp_(low, high)
    if grid.offset:
        steps.add_(grid.offset)
    return steps.mul_(grid.scale).to(x.dtype)


def pass_between(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The gradient where ``low < x < high``, else zero."""
    if _as_numbers(low):
        passed: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, low.item(), high.item())
        return passed
    return torch.where((x > low) & (x < high), gradient, 0)


class _Learned(torch.autograd.Function):
    """Fake quantization whose scale and zero point receive gradients; ``pull`` is EWGS's delta."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, floor: Tensor | None,
        limits: tuple[int, int, float], factor: float, pull: float,
    ) -> Tensor:  # fmt: skip
        scale = scale.detach() if floor is None else torch.maximum(scale.detach(), floor)
        zero_point = zero_point.detach().round().clamp(*limits[:2])
        out = round_to_grid(x, Grid(scale, zero_point, *limits))
        ctx.save_for_backward(x, out, scale, zero_point)
        ctx.limits, ctx.factor, ctx.pull = limits, factor, pull
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, out, scale, zero_point = ctx.saved_tensors
        qmin, qmax, offset = ctx.limits
        low, high = (qmin - zero_point - 0.5 + offset) * scale, (qmax - zero_point + 0.5 + offset) * scale
        passed = pass_between(gradient, x, low, high)
        to_scale = to_zero_point = None
        if ctx.needs_input_grad[1]:
            # d out / d scale is (out - x) / scale inside the range and out / scale outside (LSQ, equation 3)
            to_scale = (_shared(gradient, out, scale) - _shared(passed, x, scale)) / scale * ctx.factor
        if ctx.needs_input_grad[2]:
            # d out / d zero point is 0 inside the range and -scale outside
            clipped = (gradient - passed).float().sum_to_size(scale.shape)
            to_zero_point = (-scale * clipped).sum_to_size(zero_point.shape) * ctx.factor
        if ctx.pull:
            passed = passed * (1 + ctx.pull * passed.sign() * ((x - out) / scale).to(x.dtype))
        return passed, to_scale, to_zero_point, None, None, None, None


def _as_numbers(limit: Tensor) -> bool:
    """Whether limits are faster as plain numbers: not where a device would be waited for or a graph would end."""
    return limit.numel() == 1 and not limit.is_cuda and not torch.compiler.is_compiling()


def _shared(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The sum of ``a * b`` over everything that shares a scale."""
    if scale.numel() == 1:
        return torch.dot(a.float().reshape(-1), b.float().reshape(-1)).reshape(scale.shape)
    return (a.float() * b.float()).sum_to_size(scale.shape)


def learned_quantize(
    x: Tensor, grid: Grid, *, floor: Tensor | None = None, factor: float = 1.0, pull: float = 0.0
) -> Tensor:
    """Nearest grid value of each element; the values are those of ``fake_quantize``, bit for bit.

    The zero point is rounded and kept among the codes, the scale is kept above ``floor``; gradients pass either way.

    Gradients: straight through inside the range and zero outside for ``x``; the derivative of equation (3) of LSQ
    (Esser et al. 2020, arXiv 1902.08153) for the scale, zero inside and ``-scale`` outside for the zero point (as
    ``torch._fake_quantize_learnable_per_tensor_affine`` has them), both times ``factor``.

    Args:
        pull: delta of element-wise gradient scaling (EWGS, Lee et al. 2021, arXiv 2104.00903, equation 5): a gradient
            is multiplied by ``1 + pull * sign(gradient) * (x - q) / scale``, so that a step which leads a value back to
            its grid point is longer than one which leads it away.
    """
    limits = (grid.qmin, grid.qmax, grid.offset)
    out: Tensor = _Learned.apply(x, grid.scale, grid.zero_point, floor, limits, factor, pull)
    return out


def gradient_factor(count: int, largest: int) -> float:
    """``1 / sqrt(count * largest)``: the values that share a step, and the largest code (LSQ, section 2.2)."""
    return (count * largest) ** -0.5


def lsq_scale(x: Tensor, grid: Grid) -> Tensor:
    """LSQ's first step: ``2 mean|x| / sqrt(largest code)``, in the shape of the grid's scale."""
    count = x.numel() / grid.scale.numel()
    mean = x.detach().float().abs().sum_to_size(grid.scale.shape) / count
    return (2 * mean / max(1, grid.qmax) ** 0.5).clamp(min=SMALLEST)


def lsq_plus_scale(x: Tensor, grid: Grid) -> Tensor:
    """LSQ+'s first step of a weight: ``max(|m - 3 d|, |m + 3 d|) / 2^(b-1)``, m its mean and d its deviation."""
    x = x.detach().float()
    count = x.numel() / grid.scale.numel()
    mean = x.sum_to_size(grid.scale.shape) / count
    deviation = (((x - mean) ** 2).sum_to_size(grid.scale.shape) / count).sqrt()
    widest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    return (widest / ((grid.qmax - grid.qmin + 1) / 2)).clamp(min=SMALLEST)


class LearnedQuantizer(TrainableQuantizer):
    """The scale is a parameter (LSQ, Esser et al. 2020, arXiv 1902.08153); so is, if asked, the zero point.

    The latter is LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576) with its offset held as a zero point, so that the grid
    keeps an exact zero.

    Args:
        init: where the scale starts: ``"calibrated"`` (the grid of the format's observer), ``"lsq"`` or ``"lsq+"``
            (the papers' own; LSQ+ sets activations by least squared error, which is the calibrated grid).
        per_image: the tensor has a batch dimension, which does not count among the values that share a step.
        pull: see :func:`learned_quantize`.
    """

    floor: Tensor
    zero_point: Tensor

    def __init__(
        self, format: Format, *, channel_axis: int = 0, learn_zero_point: bool = False, init: str = "calibrated",
        per_image: bool = False, pull: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(format, channel_axis=channel_axis)
        if init not in ("calibrated", "lsq", "lsq+"):
            raise PlanishError(f"the first step size is {init!r}: choose calibrated, lsq or lsq+")
        if format.granularity == "group":
            raise PlanishError("a step for each group cannot be trained yet: use granularity channel or tensor")
        self.init, self.per_image, self.pull = init, per_image, pull
        self.learn_zero_point = learn_zero_point and not format.symmetric
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("floor", torch.zeros(()))
        if self.learn_zero_point:
            self.zero_point = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("zero_point", torch.zeros(()))

    @torch.no_grad()
    def initialize(self, x: Tensor, grid: Grid) -> None:
        scale = grid.scale.detach().float()
        if self.init == "lsq":
            scale = lsq_scale(x, grid)
        elif self.init == "lsq+" and not self.per_image:
            scale = lsq_plus_scale(x, grid)
        self.scale.data = scale.clone()
        self.floor = FLOOR * self.scale.data
        self.zero_point.data = grid.zero_point.detach().float().clone()

    @property
    def grid(self) -> Grid:
        f = self.format
        zero_point = self.zero_point.detach().round().clamp(f.qmin, f.qmax)
        return Grid(torch.maximum(self.scale.detach(), self.floor), zero_point, f.qmin, f.qmax, f.offset)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return fake_quantize(x, self.grid)
        f = self.format
        raw = Grid(self.scale, self.zero_point, f.qmin, f.qmax, f.offset)
        count = x.numel() // (x.shape[0] if self.per_image and x.dim() > 1 else 1)
        factor = gradient_factor(max(1, count // self.scale.numel()), max(1, f.qmax))
        return learned_quantize(x, raw, floor=self.floor, factor=factor, pull=self.pull)

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.scale.clamp_(min=self.floor)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("scale", "floor", "zero_point"):  # before `initialize` the shapes say nothing
            stored, mine = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and stored.shape != mine.shape:
                mine.data = torch.empty_like(stored, device=mine.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
