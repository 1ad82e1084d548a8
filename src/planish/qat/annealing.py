"""Confidence-guided annealing: in the last part of training only undecided weights may still move.

OFQ (Liu et al. 2023, arXiv 2302.02210, section 4.2). A weight far from every threshold is confident and is frozen; the
others go on until they have settled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.qat.method import Context
from planish.quantizers import StatsQuantizer
from planish.quantizers.statistics import near_threshold
from planish.training import Ingredient
from planish.training.ingredients import Compute
from planish.training.loop import Run


class ConfidenceGuidedAnnealing(Ingredient):
    """From the share ``start`` of the run on, weights farther than ``band`` steps from a threshold stay as they are.

    Masks are made anew at every step, so a weight that leaves the band freezes. Frozen weights have no gradient and are
    put back after the optimizer's step, which momentum and weight decay would otherwise move them in. A weight that is
    made from others (the product of query and key weights) passes no gradient where it is confident; the parameters
    behind it are shared by confident and undecided entries and cannot be frozen one by one.

    Weights of the first and last layer, where they have a width of their own, are left alone.
    """

    def __init__(self, context: Context, band: float = 0.005, start: float = 0.9) -> None:
        if band < 0 or not 0 <= start <= 1:
            raise PlanishError(f"annealing has a band of {band} from {start} of the run on: band >= 0, start in [0, 1]")
        bits = context.plan.scheme.weights.bits
        self.weights = [w for w in context.weights().values() if w[2].format.bits == bits]
        held = {id(tap) for _, _, tap in self.weights}
        taps = [tap for tap in context.taps.values() if isinstance(tap, StatsQuantizer)]
        self.made = [tap for tap in taps if id(tap) not in held]
        self.band, self.begin = band, start
        self.frozen: list[Tensor] = []
        self.clean: list[Tensor] = []

    def active(self, run: Run) -> bool:
        """Whether this step is annealed."""
        return run.progress >= self.begin

    @torch.no_grad()
    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        if not self.active(run):
            return
        for tap in self.made:
            tap.band = self.band
        # through detach(), which shares storage: a statistic of the weight is of the weight as it is now
        self.frozen = [~near_threshold(w, tap.grid, self.band) for _, w, tap in self.weights]
        self.clean = [w.detach().clone() for _, w, _ in self.weights]

    def around(self, run: Run, compute: Compute) -> Tensor:
        loss = compute()
        for (_, weight, _), frozen in zip(self.weights, self.frozen, strict=False):
            if weight.grad is not None:
                weight.grad.masked_fill_(frozen, 0.0)
        return loss

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for (_, weight, _), frozen, clean in zip(self.weights, self.frozen, self.clean, strict=False):
            weight.copy_(torch.where(frozen, clean, weight))
        self.frozen, self.clean = [], []

    def finish(self, run: Run) -> None:
        for tap in self.made:
            tap.band = None
        self.frozen, self.clean = [], []
