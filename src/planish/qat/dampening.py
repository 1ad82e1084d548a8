"""Two remedies for oscillating weights: pull weights to their levels, or freeze those that oscillate.

"Overcoming Oscillations in Quantization-Aware Training" (Nagel et al. 2022, arXiv 2203.11086), sections 4.2 and 4.3,
with the settings of the authors' code (github.com/Qualcomm-AI-research/oscillations-qat).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.functional import Grid, dequantize, fake_quantize, limits
from planish.qat.method import Context, Method
from planish.qat.oscillation import MOST_BITS, OscillationTracker, Rounded, rounded_weights
from planish.quantizers import TrainableQuantizer
from planish.training import Ingredient
from planish.training.loop import Run


def anneal(first: float, last: float, progress: float, start: float) -> float:
    """A cosine from ``first``, held until ``start`` (a share of the run), to ``last`` at the end."""
    part = max(0.0, (progress - start) / (1 - start))
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * part))


def dampening(weight: Tensor, grid: Grid) -> Tensor:
    """``|q(w) - clip(w, alpha, beta)|^2``, summed (equation 7), with alpha and beta the outermost levels.

    The grid and the rounded weights are constants, so that the scale gets no gradient from here, and neither does a
    weight that is clipped.
    """
    low, high = limits(grid)
    target = fake_quantize(weight.detach(), grid)
    return (target - torch.minimum(torch.maximum(weight, low), high)).square().sum()


def _rounded_as_they_are(weights: dict[str, Rounded], what: str) -> dict[str, Rounded]:
    for weight in weights.values():
        if type(weight.tap).latent is not TrainableQuantizer.latent:
            raise PlanishError(
                f"{what} needs weights that are rounded as they are, and {type(weight.tap).__name__} transforms them "
                f'first: choose weights="lsq"'
            )
    return weights


class Dampening(Ingredient):
    """``weight * dampening`` of all weights of at most ``most_bits``; ``weight`` rises along a cosine from 0.

    Args:
        weight: lambda at the end.
        start: share of the run before it begins to rise.
    """

    def __init__(self, weight: float = 0.001, start: float = 0.0, most_bits: int = MOST_BITS) -> None:
        if weight < 0 or not 0 <= start < 1:
            raise PlanishError(
                f"dampening with weight {weight} from {start} of the run: the weight is not negative, "
                f"and the start lies in [0, 1)"
            )
        self.weight, self.begin, self.most_bits = weight, start, most_bits
        self.weights: dict[str, Rounded] = {}

    def start(self, run: Run) -> None:
        self.weights = _rounded_as_they_are(rounded_weights(run.model, self.most_bits), "dampening")

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        if not self.weight or not self.weights:
            return None
        now = anneal(0.0, self.weight, run.progress, self.begin)
        parts = [dampening(weight.parameter.float(), weight.tap.grid) for weight in self.weights.values()]
        return now * torch.stack(parts).sum()

    def finish(self, run: Run) -> None:
        self.weights = {}


class Freezing(OscillationTracker):
    """Fixes the code of a weight that oscillates more often than a threshold, for the rest of the run (algorithm 1).

    The code is the rounded moving average of the codes that the weight has had, so the one it had most often. After
    every step a frozen weight is put on the level of its code on the grid as it stands: neither momentum nor decay nor
    a change of the step moves it to another. An average of the weights (``averaging``) is taken beside this and may
    round a weight that was frozen late to the code it had before.

    Args:
        first, last: the threshold falls along a cosine from ``first``, at ``start`` of the run, to ``last``. Before
            ``start`` nothing is frozen. Both should be two or three times the momentum or more.
    """

    sharded = False  # it puts single weights back

    def __init__(
        self, first: float = 0.1, last: float = 0.01, start: float = 0.25, momentum: float = 0.01,
        most_bits: int = MOST_BITS,
    ) -> None:  # fmt: skip
        super().__init__(momentum, most_bits=most_bits)
        if not 0 <= last <= first or not 0 <= start < 1:
            raise PlanishError(
                f"the freezing threshold goes from {first} to {last} beginning at {start} of the run: it cannot rise, "
                f"and the beginning lies in [0, 1)"
            )
        self.first, self.last, self.begin = first, last, start
        self.mean: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, run: Run) -> None:
        super().start(run)
        _rounded_as_they_are(self.weights, "freezing")
        self.mean = {name: codes.clone() for name, codes in self.codes.items()}
        self.held = {name: codes.clone() for name, codes in self.codes.items()}
        self.frozen = {name: torch.zeros_like(codes, dtype=torch.bool) for name, codes in self.codes.items()}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        threshold = anneal(self.first, self.last, run.progress, self.begin)
        for name, weight in self.weights.items():
            frozen, held = self.frozen[name], self.held[name]
            codes = torch.where(frozen, held, weight.codes)
            self.update(name, codes)
            self.mean[name].lerp_(codes, self.momentum)
            if run.progress >= self.begin:
                fresh = (self.frequency[name] > threshold) & ~frozen
                held.copy_(torch.where(fresh, self.mean[name].round(), held))
                frozen |= fresh
            self.codes[name] = codes = torch.where(frozen, held, codes)
            level = dequantize(codes, weight.tap.grid).to(weight.parameter.dtype)
            weight.parameter.copy_(torch.where(frozen, level, weight.parameter))

    def share_frozen(self) -> float:
        """The share of all tracked weights that are frozen."""
        count = sum(frozen.numel() for frozen in self.frozen.values())
        return sum(int(frozen.sum()) for frozen in self.frozen.values()) / max(1, count)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean, "frozen": self.frozen, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for kept in ("mean", "frozen", "held"):
            mine = getattr(self, kept)
            for name, saved in state[kept].items():
                mine[name].copy_(saved)


@dataclass(frozen=True)
class Dampen(Method):
    """LSQ with dampened oscillations; ``distillation=1`` adds the float network's logits.

    Attributes:
        dampen: lambda, the weight of the dampening at the end of the run (0.1 in the authors' code, for 20 epochs on
            ImageNet at 3 and 4 bits).
        dampen_start: share of the run before the weight begins to rise.
    """

    name: ClassVar[str] = "dampen"
    summary: ClassVar[str] = "weights are pulled to their levels, ever more strongly"
    paper: ClassVar[str] = "Nagel et al. 2022, arXiv 2203.11086"

    dampen: float = 0.001
    dampen_start: float = 0.0

    def ingredients(self, context: Context) -> list[Ingredient]:
        return [*super().ingredients(context), Dampening(self.dampen, self.dampen_start)]


@dataclass(frozen=True)
class Freeze(Method):
    """LSQ in which weights that oscillate are frozen; ``distillation=1`` adds the float network's logits.

    Attributes:
        freeze_first, freeze_last, freeze_start: the threshold of the oscillation frequency; see :class:`Freezing`.
        freeze_momentum: of the frequency.
    """

    name: ClassVar[str] = "freeze"
    summary: ClassVar[str] = "weights that oscillate between two codes are frozen"
    paper: ClassVar[str] = "Nagel et al. 2022, arXiv 2203.11086"

    freeze_first: float = 0.1
    freeze_last: float = 0.01
    freeze_start: float = 0.25
    freeze_momentum: float = 0.01

    def ingredients(self, context: Context) -> list[Ingredient]:
        freezing = Freezing(self.freeze_first, self.freeze_last, self.freeze_start, self.freeze_momentum)
        return [*super().ingredients(context), freezing]
