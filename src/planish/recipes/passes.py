"""The passes of a method with the settings of a command."""

from __future__ import annotations

from planish.ptq import HalveConstants, Pass, Reconstruct, get_method, with_settings
from planish.recipes.config import QuantizeOptions

RECONSTRUCTION_COST = 3.0  # of an image in an iteration of all units, in images of plain training


def chosen_passes(method: str, options: QuantizeOptions, seed: int) -> list[Pass]:
    """The list of passes that ``planish quantize`` and ``planish run`` apply."""
    passes = with_settings(
        get_method(method).passes(), iterations=options.iterations, memory=options.memory, precision=options.precision,
        seed=seed,
    )  # fmt: skip
    return [*passes, HalveConstants()] if options.constants == "half" else passes


def learning_cost(method: str, options: QuantizeOptions) -> float:
    """What the reconstructions of a method cost, in images of plain training; a guess to plan a run by."""
    learned = [step for step in chosen_passes(method, options, 0) if isinstance(step, Reconstruct)]
    return RECONSTRUCTION_COST * sum(step.iterations * step.batch for step in learned)
