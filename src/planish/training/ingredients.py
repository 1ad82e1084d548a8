"""The ingredient: what a paper adds to the one training loop.

A training method is a list of ingredients. Each may hold state, and does its part at fixed moments of a step::

    before_step      the batch is there, nothing is computed yet: what is drawn for a step is drawn here
    around           wraps forward and backward: perturb, compute, restore; or compute twice (SAM)
    before_part      a part of the batch is about to pass through the network
    loss             a term of the objective, from the logits of that part
    after_step       the optimizer has moved the weights
    report           every so many steps: what is worth following

Ingredients are called in the order of the list; the first one's ``around`` is the outermost. Without gradient
accumulation the only part is the whole batch (of this process). With it, ``around`` wraps all parts: noise and SAM's
step are those of the optimizer step, and each part is seen once, or once more for every further ``compute``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from planish.training.loop import Run

Compute = Callable[[], Tensor]


class Ingredient:
    """Does nothing at every moment; subclasses override what they need.

    Attributes:
        sharded: whether it can work where FSDP2 splits weights over the processes: it reads no weights, or reads and
            changes them through :mod:`planish.training.sharding`.
    """

    sharded: ClassVar[bool] = False

    def start(self, run: Run) -> None:
        """Before the first step (and before a checkpoint is loaded): attach taps, allocate state."""

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        """With the batch of this process at hand, before anything is computed; once an optimizer step."""

    def eager(self, run: Run) -> bool:
        """Whether this step does something else than the step before it, which a compiler would compile anew."""
        return False

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        """With the images at hand that pass through the network next; targets for ``loss`` are made here.

        A batch that is computed twice (SAM) and has only one part comes here once.
        """

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
