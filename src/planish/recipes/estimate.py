"""What a long training will take, said before it begins: a few steps are measured and thrown away."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from rich.console import Console

from planish.data import set_epoch
from planish.recipes.material import Material
from planish.recipes.session import say
from planish.recipes.work import duration
from planish.report.environment import peak_memory_mb
from planish.training import TaskLoss, TrainingSettings, train

LEAST = 100  # steps of a training that is worth an estimate: measuring some takes as long as they do
MEASURED = 5  # steps; the first one warms up


class Stopwatch:
    """Hears of every step of a training; the seconds of one are the median of all but the first."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self.times = clock, [clock()]

    def __call__(self, step: int, steps: int, loss: float) -> None:
        self.times.append(self.clock())

    @property
    def seconds(self) -> float:
        """Of a step; of the only one, if there was but one."""
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(gaps[1:] or gaps)


@dataclass(frozen=True)
class Estimate:
    """What is said before a long training.

    Attributes:
        epochs: of a training.
        steps: in an epoch.
        step: seconds of one.
        seconds: of everything.
        megabytes: the most memory that the measured steps took, in 10^6 bytes; ``None`` where the system does not say.
        device, processes: on which they were measured.
    """

    epochs: int
    steps: int
    step: float
    seconds: float
    megabytes: float | None
    device: str
    processes: int = 1

    def __str__(self) -> str:
        where = self.device if self.processes == 1 else f"{self.processes} processes with {self.device}"
        plural = "epoch" if self.epochs == 1 else "epochs"
        unit = f"{1e3 * self.step:.0f} ms" if self.step < 1 else f"{self.step:.1f} s"
        memory = "" if self.megabytes is None else f", {self.megabytes / 1e3:.2g} GB of memory"
        each = " each" if self.processes > 1 and memory else ""
        return (
            f"estimate: {self.epochs} {plural} of {self.steps} steps at {unit}, about {duration(self.seconds)} in all "
            f"on {where}{memory}{each}"
        )


def worth_it(material: Material, epochs: int) -> bool:
    """Whether a training is long enough to be estimated first."""
    return epochs * len(material.train) >= LEAST


def measured(material: Material, measure: Callable[[list[Any], Stopwatch], Any]) -> tuple[float, float | None]:
    """Seconds of a step and the most memory so far in 10^6 bytes; ``measure`` trains on the batches it is given."""
    set_epoch(material.train, 0)
    batches = list(islice(material.train, 1)) * MEASURED
    if material.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(material.device)
    watch = Stopwatch()
    measure(batches, watch)
    return watch.seconds, peak_memory_mb(material.device)


def plain_step(material: Material, training: TrainingSettings) -> tuple[float, float | None]:
    """:func:`measured` of plain training of a copy of the given network."""

    def measure(batches: list[Any], watch: Stopwatch) -> None:
        twin = copy.deepcopy(material.loaded.model)
        train(twin, batches, [TaskLoss()], replace(training, epochs=1), progress=watch)

    return measured(material, measure)


def tell(
    console: Console, material: Material, epochs: int, step: tuple[float, float | None], steps: float, processes: int
) -> Estimate:
    """Print the estimate of a run that costs as much as ``steps`` of the measured steps."""
    seconds, megabytes = step
    estimate = Estimate(
        epochs, len(material.train), seconds, steps * seconds, megabytes, str(material.device), processes
    )
    say(console, str(estimate))
    return estimate
