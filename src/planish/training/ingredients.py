"""The ingredient: what a paper adds to the one training loop.

A training method is a list of ingredients. Each may hold state, and does its part at fixed moments of a step::

    before_step      the batch is there, nothing is computed yet
    around           wraps forward and backward: perturb, compute, restore; or compute twice (SAM)
    loss             a term of the objective, from the logits
    after_step       the optimizer has moved the weights
    report           every so many steps: what is worth following

Ingredients are called in the order of the list; the first one's ``around`` is the outermost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from planish.training.loop import Run

Compute = Callable[[], Tensor]


class Ingredient:
    """Does nothing at every moment; subclasses override what they need."""

    def start(self, run: Run) -> None:
        """Before the first step (and before a checkpoint is loaded): attach taps, allocate state."""

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        """With the batch at hand, before anything is computed."""

    def around(self, run: Run, compute: Compute) -> Tensor:
        """Call ``compute`` (forward and backward; gradients add up) and return its loss."""
        return compute()

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        """A term of the objective, already weighted; ``None`` for no term."""
        return None

    def after_step(self, run: Run) -> None:
        """After the optimizer step."""

    def report(self, run: Run) -> dict[str, float]:
        """Numbers to follow, such as the size of a noise; asked after a step, every so often."""
        return {}

    def finish(self, run: Run) -> None:
        """After the last step, in the order of the list; also after a failure, to take taps off (``run.failed``)."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that ``load_state_dict`` needs to continue to the identical result."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave, after ``start``."""
