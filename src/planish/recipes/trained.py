"""One trained arm: it can be interrupted, and leaves its last good weights if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from planish.data import set_epoch
from planish.errors import PlanishError
from planish.flattening import FlattenSettings, flatten
from planish.models import save_weights
from planish.network.taps import CHILD
from planish.recipes.material import Material
from planish.recipes.processes import is_main
from planish.recipes.session import StopFlag
from planish.training import TrainingFailed
from planish.training.loop import CHECKPOINT_MINUTES


def train_arm(
    material: Material,
    schemes: Sequence[str],
    settings: FlattenSettings,
    *,
    allow: tuple[str, ...],
    checkpoint: Path,
    resume: bool,
    stop: StopFlag,
    progress: Callable[[float], None],
    last_good: Path,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> nn.Module:
    """Train a copy of the given network; the caller saves it and then asks ``stop``.

    Args:
        checkpoint: folder for the state from which ``resume`` continues.
        checkpoint_minutes, log: as in :func:`planish.training.train`.
        progress: receives the share of the steps that are done.
        last_good: file for the last good weights, should the loss cease to be finite.

    Raises:
        PlanishError: bad input, a full disk, or a loss that is not finite (with the place of the last good weights).
        KeyboardInterrupt: ``stop`` was set; the checkpoint is written.
    """
    # A finished training that is resumed runs no epoch any more; what follows it is to see the last epoch's order.
    set_epoch(material.train, settings.training.epochs - 1)
    with stop.gently(), keeping(last_good):
        return flatten(
            material.loaded.model, material.train, schemes, settings=settings, allow=allow,
            checkpoint_dir=checkpoint, checkpoint_minutes=checkpoint_minutes, resume=resume, log=log, should_stop=stop,
            progress=lambda step, steps, loss: progress(step / steps),
        )  # fmt: skip


@contextmanager
def keeping(last_good: Path) -> Iterator[None]:
    """Inside, a training that fails leaves its last good weights and says where."""
    try:
        yield
    except TrainingFailed as error:
        # without what belongs to the taps, so that the file is one for --weights
        own = {key: value for key, value in error.state_dict.items() if CHILD not in key.split(".")}
        if is_main():
            save_weights(own, last_good, {"format": "pt"})
        raise PlanishError(f"{error}; the last good weights are in {last_good}") from None
