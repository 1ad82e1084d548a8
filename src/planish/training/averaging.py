"""Averages of the weights along training: the cheapest way to a flatter minimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.training.ingredients import Ingredient
from planish.training.loop import Run
from planish.training.sharding import copy_into, local


class Averaging(Ingredient):
    """Keep an average of the weights and hand it back at the end in place of the last weights.

    ``decay`` in (0, 1): moving average, ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + n) / (10 + n))``
    after n updates, so that a short run is not dominated by where it began. ``decay=None``: the equal average of all
    weights since ``start`` (SWA, Izmailov et al. 2018, arXiv 1803.05407), taken every step.

    ``until`` a share of the run: there the average becomes the weights, and training goes on from it without one.

    BatchNorm statistics of the average are to be re-estimated afterwards; buffers are left as trained.
    """

    sharded = True

    def __init__(self, decay: float | None = 0.998, start: float = 0.0, until: float = 1.0) -> None:
        if decay is not None and not 0 < decay < 1:
            raise PlanishError(
                f"the averaging decay is {decay}: it lies between 0 and 1, or is None for an equal average"
            )
        if not 0 <= start < 1:
            raise PlanishError(f"averaging starts at {start} of the run: give a share of the steps in [0, 1)")
        if not start < until <= 1:
            raise PlanishError(f"averaging goes from {start} until {until} of the run: give start < until <= 1")
        self.decay, self.begin, self.until, self.count = decay, start, until, 0
        self.over = False
        self.average: list[Tensor] = []

    def start(self, run: Run) -> None:
        self.count, self.over = 0, False
        weights = [p.detach() for p in run.model.parameters() if p.requires_grad]
        self.average = [w.clone() for w in weights]
        # as far as this process has them; once and not in every step, because looking for them takes its time
        self.here = [local(a) for a in self.average], [local(w) for w in weights]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if run.progress < self.begin or self.over:
            return
        self.count += 1
        rate = 1 / self.count if self.decay is None else 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        average, weights = self.here
        torch._foreach_lerp_(average, weights, rate)
        if self.until < 1 and (run.step + 1) / run.steps >= self.until:
            self.over = True
            torch._foreach_copy_(weights, average)

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        if not run.failed and self.count and not self.over:
            average, weights = self.here
            torch._foreach_copy_(weights, average)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "average": self.average, "over": self.over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.over = state["count"], state.get("over", False)
        for mine, saved in zip(self.average, state["average"], strict=True):
            copy_into(mine, saved)
