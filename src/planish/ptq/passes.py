"""The pass: one step of post-training quantization. A PTQ method is an ordered list of passes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Assignment, Product, Site, assign, attach, detach, taps_of, watch
from planish.network.batches import call_model, first_image, logits_of
from planish.ptq.journal import Journal
from planish.scheme import Scheme
from planish.task import Task, task_of

MEASURED = 128  # images on which the log says what a pass did; on all of them this took longer than most passes


@dataclass
class Calibration:
    """What a pass works on: the model (changed in place), the images, and the plan of formats."""

    model: nn.Module
    batches: list[Any]  # inputs only
    assignment: Assignment
    reference: list[Tensor]  # logits of the float model, batch by batch
    given: nn.Module | None = None  # the float model as it was given; not to be changed
    allow: tuple[str, ...] = ()  # patterns of products that may stay in float
    log: list[dict[str, Any]] = field(default_factory=list)
    float_twin: nn.Module | None = None  # the network in float, with the layers that it has now; see ptq/outputs.py
    tell: Callable[[dict[str, Any]], None] = lambda line: None  # hears every line of the log as it is written
    progress: Callable[[float], None] = lambda share: None  # of the pass that is running
    journal: Journal = field(default_factory=Journal)  # what an interrupted quantization had done
    place: int = 0  # of the running pass in the list

    @property
    def task(self) -> Task:
        """What the outputs mean."""
        return task_of(self.model, self.reference[0])

    def record(self, **line: Any) -> None:
        """Write a line into the log."""
        self.log.append(line)
        self.tell(line)

    def note(self, name: str, text: str) -> None:
        """Leave a line in the log: what the pass ``name`` did otherwise than its name says."""
        self.record(event="note", **{"pass": name}, text=text)

    def float_changes(self) -> None:
        """A pass changes the network in float: what was kept of it is let go. Once anything is quantized it stays."""
        if next(taps_of(self.model), None) is None:
            self.float_twin = None

    def plan_anew(self, scheme: Scheme | None = None) -> None:
        """Watch the model again and assign formats: after its structure or its scheme has changed. Taps are removed."""
        detach(self.model)
        watched = watch(self.model, first_image(self.batches[0]))
        self.assignment = assign(watched, scheme or self.assignment.scheme, allow=self.allow)


class Pass(Protocol):
    """Changes ``calibration.model`` in place."""

    @property
    def name(self) -> str: ...

    def __call__(self, calibration: Calibration) -> None: ...


@torch.no_grad()
def run_logits(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Logits of every batch, on the CPU."""
    model.eval()
    return [logits_of(call_model(model, batch)).float().cpu() for batch in batches]


def watch_sites(
    model: nn.Module, products: Sequence[Product], batches: Sequence[Any], make: Callable[[Site], nn.Module | None]
) -> dict[str, nn.Module]:
    """What ``make(site)`` gives, by site, after all batches have passed; taps are removed before and afterwards."""
    watchers = attach(model, products, make)
    model.eval()
    try:
        for batch in batches:
            call_model(model, batch)
    finally:
        detach(model)
    return watchers


def measure(calibration: Calibration, batches: int | None = None) -> dict[str, float]:
    """Mean squared error of the logits and agreement with the float model, on the calibration images, or on so many
    batches of them.

    Agreement is the share of equal first classes (or sets of labels), or the mean cosine of features.
    """
    return _compare(calibration, run_logits(calibration.model, calibration.batches[:batches]))


def _compare(calibration: Calibration, batches: Sequence[Tensor]) -> dict[str, float]:
    """The same for logits of the first batches."""
    logits, reference = torch.cat(list(batches)), torch.cat(calibration.reference[: len(batches)])
    agreement = calibration.task.alike(reference, logits).mean().item()
    return {"mse": F.mse_loss(logits, reference).item(), "agreement": agreement}


def run_passes(calibration: Calibration, passes: Sequence[Pass]) -> None:
    """Apply the passes in order; each leaves a line in the log with what it changed and how long it took.

    What it changed is measured on as many batches as hold ``MEASURED`` images.

    Raises:
        PlanishError: one of them is no pass, before any is applied.
    """
    for step in passes:
        if isinstance(step, type) or not callable(step) or not isinstance(getattr(step, "name", None), str):
            raise PlanishError(
                f"a list of passes holds {step!r}: give objects such as Round(), each with a name, or the name of a "
                "method in place of the list"
            )
    ends = itertools.accumulate(len(logits) for logits in calibration.reference)
    count = 1 + sum(end < MEASURED for end in ends)
    before = _compare(calibration, calibration.reference[:count])  # nothing has changed yet
    for calibration.place, step in enumerate(passes):
        began = time.perf_counter()
        step(calibration)
        seconds = time.perf_counter() - began
        after = measure(calibration, count)
        calibration.record(event="pass", **{"pass": step.name}, before=before, after=after, seconds=seconds)
        before = after
