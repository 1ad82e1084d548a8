"""When a step is perturbed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from planish.errors import PlanishError
from planish.training.loop import Run


@dataclass(frozen=True)
class Schedule:
    """Steps between ``start`` and ``until`` (shares of the run), and of these a random ``share``.

    The steps that are left clean hold the full-precision network in place and cost nothing extra. Which steps they are
    depends on (seed, step) alone, so that weight and activation noise fall on the same steps. ``refresh`` is the least
    number of steps between two measurements of the quantization error.
    """

    start: float = 0.0
    until: float = 0.9
    share: float = 0.5
    refresh: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.until <= 1:
            raise PlanishError(f"noise from {self.start} until {self.until} of the run: give 0 <= start <= until <= 1")
        if not 0 < self.share <= 1:
            raise PlanishError(f"the share of perturbed steps is {self.share}: it is above 0 and at most 1")
        if self.refresh < 1:
            raise PlanishError(f"refresh is {self.refresh}: the error is measured every 1 or more steps")

    def active(self, run: Run) -> bool:
        """Whether this step is perturbed."""
        if not self.start <= run.progress < self.until:
            return False
        return self.share == 1 or random.Random(f"{self.seed}/{run.step}").random() < self.share

    def due(self, run: Run, measured: int) -> bool:
        """Whether the error is to be measured in this step, the last time having been ``measured`` (-1: never)."""
        return measured < 0 or run.step - measured >= self.refresh

    def pick(self, run: Run, count: int) -> int:
        """Which of ``count`` schemes' errors this step imitates; the same for weights and activations."""
        return 0 if count == 1 else random.Random(f"{self.seed}/{run.step}/scheme").randrange(count)
