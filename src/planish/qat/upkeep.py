"""What every quantized training needs after a step."""

from __future__ import annotations

from collections.abc import Mapping

from planish.quantizers import TrainableQuantizer
from planish.training.ingredients import Ingredient
from planish.training.loop import Run


class Upkeep(Ingredient):
    """Brings step sizes that an update has driven below zero (or near it) back to where they mean something."""

    sharded = True  # steps stay whole

    def __init__(self, taps: Mapping[str, TrainableQuantizer]) -> None:
        self.taps = taps

    def after_step(self, run: Run) -> None:
        for tap in self.taps.values():
            tap.keep_valid()
