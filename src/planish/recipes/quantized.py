"""The journey of ``planish train``: where to start, the training of the quantized network, what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from planish.data import set_epoch
from planish.deploy.checkpoint import load, read_head
from planish.deploy.origin import plain_recipe
from planish.errors import PlanishError
from planish.evaluation import evaluate
from planish.models import LoadedModel, read_weights, save_weights
from planish.network.batches import split_batch
from planish.ptq import quantize
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.oscillation import OscillationTracker
from planish.recipes.arms import arm_settings, training_settings
from planish.recipes.config import NoiseOptions, TrainOptions
from planish.recipes.estimate import measured, tell, worth_it
from planish.recipes.kept import Kept
from planish.recipes.material import Material
from planish.recipes.processes import count_processes, is_main, on_main
from planish.recipes.session import StopFlag
from planish.recipes.trained import keeping, train_arm
from planish.training.loop import CHECKPOINT_MINUTES

STARTS = ("given", "flat")
FLAT_SHARE = 0.9  # what a step of flattening costs, in steps with learned quantizers (docs/training.md, flattening.md)


def split_epochs(start: str, flat: int | None, epochs: int) -> int:
    """Of ``epochs`` in all, those that go into flattening; raises :class:`PlanishError` if none is left for either."""
    if start != "flat":
        if flat is not None:
            raise PlanishError("flat-epochs is for --start flat: leave it out, or give --start flat")
        return 0
    flat = epochs // 2 if flat is None else flat
    if not 0 < flat < epochs:
        raise PlanishError(
            f"flat-epochs is {flat} of {epochs} epochs in all: flattening and training need at least 1 each"
        )
    return flat


def check_start(start: str) -> None:
    """Raise :class:`PlanishError` if ``start`` is no word that is known and no file of a quantized model."""
    if start in STARTS:
        return
    if not Path(start).is_file():
        raise PlanishError(
            f"start is {start!r}: give {' or '.join(STARTS)}, or a file that planish quantize or planish train wrote"
        )
    head = read_head(Path(start))
    if head is None:
        keys = len(read_weights(start)[0])
        raise PlanishError(f"{start} holds plain weights ({keys} tensors), no quantized model: give it as --weights")
    if head.assignment is None:
        raise PlanishError(f"{start} holds a network in float: give one that planish quantize or planish train wrote")


def read_start(start: str, given: LoadedModel) -> nn.Module | None:
    """The quantized model in the file ``start``; ``None`` for a start that is no file.

    Only a file of the given architecture is read on, so that no code is run but what built the given network.

    Raises:
        PlanishError: the model in the file has another architecture.
    """
    if start in STARTS:
        return None
    head = read_head(Path(start))
    assert head is not None
    if head.recipe != plain_recipe(given.recipe):
        raise PlanishError(
            f"{start} is a quantized {_architecture(head.recipe)}, the given network is a "
            f"{_architecture(given.recipe)}: give the model that the file was made from"
        )
    return load(Path(start), trust=True)


def _architecture(recipe: dict[str, Any]) -> str:
    if recipe.get("source") == "file":
        return f"{recipe.get('path')}:{recipe.get('function')}"
    arguments = ", ".join(f"{name}={value}" for name, value in dict(recipe.get("arguments", {})).items())
    return f"{recipe.get('architecture')}({arguments})"


@dataclass
class QuantizedTraining:
    """One training of a quantized network, which can be interrupted and goes on to the identical result.

    Attributes:
        epochs: of the quantized network; ``flat_epochs`` come before them.
        start: what :func:`read_start` gave.
        log: receives the events of the training; those of a flat start have the arm ``flat``.
        unlabelled: a loader of images without labels, for a method that takes them.
    """

    material: Material
    scheme: str
    method: Method
    options: TrainOptions
    epochs: int
    flat_epochs: int
    seed: int
    allow: tuple[str, ...]
    start: nn.Module | None
    unlabelled: Any
    kept: Kept
    stop: StopFlag
    checkpoint_minutes: float = CHECKPOINT_MINUTES
    log: Callable[[dict[str, Any]], None] = lambda event: None

    def __post_init__(self) -> None:
        until = self.method.averaging_until  # where averaging stops early, annealing begins
        self.tracker = OscillationTracker(report_at=until if 0 < until < 1 else None)

    @property
    def settings(self) -> QATSettings:
        """Of the training of the quantized network."""
        training = training_settings(self.options, self.seed)
        return QATSettings(training=replace(training, epochs=self.epochs, freeze_batchnorm=False))

    def rehearse(self, batches: list[Any] | None = None, progress: Callable[..., None] | None = None) -> None:
        """One step from the given network, thrown away: what the method or the network refuses is refused at once.

        Args:
            batches: steps that are taken instead.
            progress: hears of each of them.
        """
        if batches is None:
            set_epoch(self.material.train, 0)
            batches = list(islice(self.material.train, 1))
        settings = replace(self.settings, training=replace(self.settings.training, epochs=1))
        train_quantized(
            self.material.loaded.model, batches, self.scheme, self.method, unlabelled=self.unlabelled,
            calibration=[split_batch(batches[0])[0]], settings=settings, allow=self.allow, progress=progress,
        )  # fmt: skip

    def estimate(self, console: Console) -> None:
        """Say what it will take, from a few steps of this method; a short training is not worth it."""
        if not worth_it(self.material, self.epochs + self.flat_epochs):
            return
        step = measured(self.material, self.rehearse)
        epochs = self.epochs + FLAT_SHARE * self.flat_epochs
        whole = self.epochs + self.flat_epochs
        tell(console, self.material, whole, step, epochs * len(self.material.train), count_processes())

    def flatten(self, progress: Callable[[float], None]) -> None:
        """Make the flat start, or read it back if an interrupted command had come that far."""
        given, done = self.material.loaded.model, self.kept.folder / "flat.safetensors"
        if on_main(done.exists):
            self.start = copy.deepcopy(given)
            self.start.load_state_dict(read_weights(done)[0])
            return
        options = replace(self.options, epochs=self.flat_epochs)
        settings = arm_settings("flat", options, NoiseOptions(), self.seed)
        assert settings is not None
        self.start = train_arm(
            self.material, (self.scheme,), settings, allow=self.allow, checkpoint=self.kept.folder / "flat",
            resume=True, stop=self.stop, progress=progress, last_good=self.kept.last_good,
            checkpoint_minutes=self.checkpoint_minutes, log=lambda event: self.log({"arm": "flat", **event}),
        )  # fmt: skip
        if is_main():
            save_weights(self.start, done, {"format": "pt"})

    def train(self, progress: Callable[[float], None]) -> nn.Module:
        """Train; the teacher is always the given network in float."""
        given = self.material.loaded.model
        start = given if self.start is None else self.start.to(self.material.device)
        set_epoch(self.material.train, 0)
        with self.stop.gently(), keeping(self.kept.last_good):
            return train_quantized(
                start, self.material.train, self.scheme, self.method, given=given,
                calibration=self.material.calibration, unlabelled=self.unlabelled, settings=self.settings,
                allow=self.allow, extra=[self.tracker], checkpoint_dir=self.kept.state, resume=True,
                checkpoint_minutes=self.checkpoint_minutes, log=self.log, should_stop=self.stop,
                progress=lambda step, steps, loss: progress(step / steps),
            )  # fmt: skip

    def _rounded(self, model: nn.Module) -> nn.Module:
        return quantize(model, self.material.calibration, self.scheme, allow=self.allow)

    def measure(self, trained: nn.Module) -> list[dict[str, Any]]:
        """The given network in float, rounded without training, the start if it was another, and the trained network,
        on the test images."""
        given, test = self.material.loaded.model, self.material.test
        models = {f"{self.scheme} by rtn": self._rounded(given)}
        if self.start is not None and self.flat_epochs:
            models[f"{self.scheme} flat by rtn"] = self._rounded(self.start)
        elif self.start is not None:
            models[f"{self.scheme} at the start"] = self.start
        models[f"{self.scheme} trained"] = trained
        worth = {"float": evaluate(given, test)}
        worth |= {name: evaluate(model, test, reference=given) for name, model in models.items()}
        return [{"name": name, **values} for name, values in worth.items()]
