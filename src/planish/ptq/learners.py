"""How a weight learns which way to be rounded: taps that hold what is learned, and the optimizer of each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid
from planish.quantizers import LearnedQuantizer, TrainableQuantizer, learned_quantize
from planish.scheme import Format

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched, so that 0 and 1 are reached (AdaRound, equation 23)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)`` (Nagel et al. 2020, arXiv 2004.10568, equation 23)."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``v`` for which :func:`rectified_sigmoid` is ``h``, which lies in [0, 1]."""
    return ((h - GAMMA) / (ZETA - h)).log()


class SoftRounding(TrainableQuantizer):
    """A weight between the two grid points around it: ``scale * clip(floor(w / scale) + h(v))``.

    The integers below are those of the first scale and stay, so that the scale may be learned beside ``v`` (Genie-M,
    Jeon et al. 2023, arXiv 2212.04780, equation 7); with a fixed one it is AdaRound. At first ``h(v)`` is the weight's
    own fraction, and it passes unrounded.
    """

    below: Tensor
    zero_point: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0, learn_scale: bool = False) -> None:
        super().__init__(format, channel_axis=channel_axis)
        self.learn_scale = learn_scale
        self.v = nn.Parameter(torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learn_scale)
        for name in ("below", "zero_point", "floor"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def initialize(self, x: Tensor, grid: Grid) -> None:
        steps = x.float() / grid.scale - grid.offset
        self.below = steps.floor()
        self.v.data = inverse_rectified_sigmoid((steps - self.below).clamp(0.0, 1.0))
        self.scale.data, self.zero_point = grid.scale.clone(), grid.zero_point.clone()
        self.floor = 0.1 * grid.scale

    @property
    def grid(self) -> Grid:
        f = self.format
        return Grid(torch.maximum(self.scale.detach(), self.floor), self.zero_point, f.qmin, f.qmax, f.offset)

    def _values(self, up: Tensor) -> Tensor:
        f = self.format
        codes = (self.below + up + self.zero_point).clamp(f.qmin, f.qmax) - self.zero_point
        return (codes + f.offset if f.offset else codes) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self._values(rectified_sigmoid(self.v)).to(x.dtype)

    def penalty(self, beta: float) -> Tensor:
        """``sum(1 - |2 h(v) - 1|^beta)``: zero where every weight has decided (AdaRound, equation 24)."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.scale.clamp_(min=self.floor)

    @torch.no_grad()
    def latent(self, x: Tensor) -> Tensor:
        """The weight, as it was decided: on the grid."""
        return self._values((rectified_sigmoid(self.v) >= 0.5).to(self.v.dtype)).to(x.dtype)


class SignRounding(TrainableQuantizer):
    """``round(w / (a scale) + v)`` with ``v`` in [-1/2, 1/2] and ``a`` in [1/2, 1], straight through (SignRound).

    Cheng et al. 2023, arXiv 2309.05516, equations 3 and 4; there the two ends of the range have a factor each, here one
    serves both, because the grid is symmetric.
    """

    zero_point: Tensor
    first: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0) -> None:
        super().__init__(format, channel_axis=channel_axis)
        self.v, self.a = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))
        for name in ("first", "zero_point"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def initialize(self, x: Tensor, grid: Grid) -> None:
        self.first, self.zero_point = grid.scale.clone(), grid.zero_point.clone()
        self.v.data, self.a.data = torch.zeros_like(x, dtype=torch.float32), torch.ones_like(grid.scale)

    @property
    def grid(self) -> Grid:
        f = self.format
        return Grid((self.first * self.a).detach(), self.zero_point, f.qmin, f.qmax, f.offset)

    def _shifted(self, x: Tensor) -> tuple[Tensor, Grid]:
        f, scale = self.format, self.first * self.a
        return x + self.v * scale.detach(), Grid(scale, self.zero_point, f.qmin, f.qmax, f.offset)

    def forward(self, x: Tensor) -> Tensor:
        moved, grid = self._shifted(x)
        return learned_quantize(moved, grid).to(x.dtype)

    @torch.no_grad()
    def keep_valid(self) -> None:
        self.v.clamp_(-0.5, 0.5)
        self.a.clamp_(0.5, 1.0)

    @torch.no_grad()
    def latent(self, x: Tensor) -> Tensor:
        moved, grid = self._shifted(x)
        return learned_quantize(moved, grid).to(x.dtype)


class SignSGD(torch.optim.Optimizer):
    """``p <- p - lr sign(gradient)`` (Bernstein et al. 2018, arXiv 1802.04434)."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"])


@dataclass(frozen=True)
class Learner:
    """One way to learn the rounding.

    Attributes:
        make: the tap of a weight.
        travel: how far a rounding (``v``), or a weight in steps of its grid, may come in all: the learning rate of Adam
            times the iterations, so that short runs decide as long ones do.
        scale_travel: the same for the scales of weights, as a share of them.
        moves_weights: the latent weights are trained, too.
        regularised: the roundings are driven to a decision by a penalty.
    """

    make: Callable[[Format, int], TrainableQuantizer]
    travel: float
    scale_travel: float = 0.0
    moves_weights: bool = False
    regularised: bool = False
    sign: bool = False


LEARNERS = {
    "adaround": Learner(lambda fmt, axis: SoftRounding(fmt, channel_axis=axis), 12.0, regularised=True),
    "genie": Learner(
        lambda fmt, axis: SoftRounding(fmt, channel_axis=axis, learn_scale=True), 12.0, 0.1, regularised=True
    ),
    "ste": Learner(lambda fmt, axis: LearnedQuantizer(fmt, channel_axis=axis), 2.0, 0.5, moves_weights=True),
    "signround": Learner(lambda fmt, axis: SignRounding(fmt, channel_axis=axis), 1.0, sign=True),
}


def get_learner(name: str) -> Learner:
    """The learner called ``name``; raises :class:`PlanishError` with the names that exist."""
    if name not in LEARNERS:
        raise PlanishError(f"the rounding is learned by {name!r}: choose one of {', '.join(LEARNERS)}")
    return LEARNERS[name]


def penalty_beta(progress: float, warmup: float = 0.2, first: float = 20.0, last: float = 2.0) -> float | None:
    """The exponent of the penalty: none in the first fifth of the iterations, then a cosine from 20 down to 2."""
    if progress < warmup:
        return None
    part = (progress - warmup) / (1 - warmup)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * part))


class Coin:
    """Random masks that are cheap: pieces of a pool of throws, from a random place on.

    Args:
        p: how often a mask is true.
    """

    def __init__(self, p: float, seed: int, device: torch.device | str = "cpu") -> None:
        self.p, self.generator = p, torch.Generator(device).manual_seed(seed)
        self.places = torch.Generator().manual_seed(seed)
        self.pool = self._throw(1 << 20)

    def _throw(self, count: int) -> Tensor:
        found = torch.rand(count, generator=self.generator, device=self.generator.device)
        return found.lt_(self.p)

    def mask(self, x: Tensor) -> Tensor:
        """A mask of the shape of ``x``, of ones and zeros."""
        count = x.numel()
        if len(self.pool) < count + count // 4:
            self.pool = torch.cat([self.pool, self._throw(2 * count)])
        at = int(torch.randint(len(self.pool) - count + 1, (), generator=self.places))
        return self.pool[at : at + count].view(x.shape)


class _Mix(torch.autograd.Function):
    """``a`` where the mask is 0 and ``b`` where it is 1; several times faster than ``torch.where`` on a CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return torch.lerp(a, b, mask.to(a.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        to_b = gradient * mask.to(gradient.dtype)
        return gradient - to_b, to_b, None


def mix(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Values of ``a``, or of ``b`` where the mask of ones and zeros is 1."""
    out: Tensor = _Mix.apply(a, b, mask)
    return out


class DroppingTap(nn.Module):
    """Quantizes some values and lets the others pass (QDrop, Wei et al. 2022, arXiv 2203.05740, equation 9)."""

    def __init__(self, quantizer: LearnedQuantizer, coin: Coin | None) -> None:
        super().__init__()
        self.quantizer, self.coin = quantizer, coin

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.quantizer(x)
        if self.coin is None:
            return rounded
        return mix(rounded, x, self.coin.mask(x))


def trainable(taps: Iterable[nn.Module], kind: type[nn.Module]) -> list[nn.Parameter]:
    """The parameters of some taps that are learned."""
    return [p for tap in taps if isinstance(tap, kind) for p in tap.parameters() if p.requires_grad]
