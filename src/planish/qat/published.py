"""Settings that the authors of a method trained with, as `planish train` and :func:`planish.train` take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from planish.training import TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """One training as it was published.

    Attributes:
        batch_size: images in a batch, of all devices together.
        training: epochs, optimizer, learning rate and what else the loop knows.
        options: of the method, where they are not its defaults.
        besides: what was done that planish has no setting for.
    """

    batch_size: int
    training: TrainingSettings
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    besides: str = ""

    @property
    def command_line(self) -> str:
        """The options of `planish train`."""
        training = self.training
        words = {
            "epochs": training.epochs, "batch-size": self.batch_size, "optimizer": training.optimizer,
            "lr": training.lr, "weight-decay": training.weight_decay, "warmup": training.warmup,
            "final-lr": training.final_lr,
        }  # fmt: skip
        text = " ".join(f"--{name} {_short(value)}" for name, value in words.items() if value is not None)
        options = " ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        return f"{text} --option {options}" if options else text


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
