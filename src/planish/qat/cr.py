"""CR: the network in training agrees with its own moving average on another view of the image.

In the manner of Pang et al. 2024 (arXiv 2402.13497), as far as their algorithm is known: a mean teacher (Tarvainen and
Valpola 2017, arXiv 1703.01780), quantized like the student, over LSQ. Images without labels take part like the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.data.views import distort, random_view
from planish.errors import PlanishError
from planish.network.batches import call_model, cut, logits_of, map_tensors, size_of, split_batch, to_device
from planish.network.faults import BadBatch, fault_in
from planish.qat.method import Context, Method
from planish.task import CLASSES, Task, task_of
from planish.training import Ingredient
from planish.training.engine import begin_epoch
from planish.training.loop import Run
from planish.training.shares import Share, SharedLoader, bounds

EVALUATED = ("student", "teacher")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, task: Task = CLASSES) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, or what the task has in its place: the mean over images.

    There is no gradient to the teacher.
    """
    return task.divergence(teacher.detach(), student, temperature)


def ramp_up(progress: float, length: float) -> float:
    """``exp(-5 (1 - min(t / T, 1))^2)``: from e^-5 at the start to 1 at ``length`` of the run (Laine and Aila 2017)."""
    return math.exp(-5 * (1 - min(progress / length, 1.0)) ** 2) if length > 0 else 1.0


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """``teacher <- decay teacher + (1 - decay) student`` for weights, step sizes and BatchNorm statistics.

    A scale between two positive ones is positive. A learned zero point is averaged unrounded and rounded where it is
    used; other buffers (counts, fixed zero points) are copied.
    """
    torch._foreach_lerp_([p.detach() for p in teacher.parameters()], list(student.parameters()), 1 - decay)
    for (name, mine), theirs in zip(teacher.named_buffers(), student.buffers(), strict=True):
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            mine.lerp_(theirs, 1 - decay)
        else:
            mine.copy_(theirs)


class Endless:
    """Batches without end, at a position that the step alone decides, so that an interrupted run goes on as it was.

    Args:
        loader: batches of images, or of (images, labels), or shares of them; the labels are dropped unread.
        device: where the training runs, whose random state stays as it is.
    """

    def __init__(self, loader: Iterable[Any], seed: int, device: torch.device | None = None) -> None:
        if not isinstance(loader, Sized) or len(loader) == 0:
            raise PlanishError("the unlabelled images come from a loader with a length that yields at least one batch")
        self.loader, self.seed, self.length = loader, seed, len(loader)
        self.devices = [device] if device is not None and device.type == "cuda" else []
        self.at = -1
        self.batches: Iterator[Any] = iter(())

    def get(self, step: int) -> Any:
        """The images of a step: the next ones, or those at its place if steps were left out."""
        epoch, index = divmod(step, self.length)
        # what else the step draws depends neither on where the run resumed nor on what the loader draws
        with torch.random.fork_rng(devices=self.devices):
            if step != self.at or index == 0:
                begin_epoch(self.loader, epoch, self.seed)
                self.batches = islice(iter(self.loader), index, None)
            batch = next(self.batches)
        self.at = step + 1
        inputs = split_batch(batch.batch if isinstance(batch, Share) else batch)[0]
        if (fault := fault_in(inputs)) is not None:
            raise BadBatch(f"of the images without labels {fault}")
        return inputs


class ConsistencyRegularization(Ingredient):
    """``weight(t) * KL(teacher(view 2) || student(view 1))``, the teacher being a moving average of the student.

    View 1 of the labelled images is the batch as it comes, whose logits the step has anyway; view 2 is another random
    shift and reflection of it. Images without labels are given to the teacher as they come and to the student in a
    second view, distorted if asked for, which costs a second forward and backward pass. So BatchNorm in the student
    normalizes either kind of images by their own statistics, and its running ones follow both.

    The teacher is in evaluation mode, with running statistics that are averages of the student's.

    Args:
        weight: the weight that the ramp reaches (lambda).
        ramp: share of the run over which it rises.
        decay: of the average, at most (a); after t steps it is ``min((1 + t) / (10 + t), decay)``. With an equal
            average of all steps, ``1 - 1 / (t + 1)``, the bad first steps made a poor teacher for a hundred steps.
        temperature: of both distributions.
        shift, flip: of a second view, see :func:`planish.data.views.random_view`.
        strength: of the distortion of what the student sees of unlabelled images, see
            :func:`planish.data.views.distort`.
        evaluate: what is handed back: the ``"student"``, or the ``"teacher"`` (which an :class:`Averaging` after it
            would overwrite).
        unlabelled: batches of further images; a loader with a length.
    """

    def __init__(
        self, weight: float = 1.0, *, ramp: float = 0.3, decay: float = 0.999, temperature: float = 1.0,
        shift: float = 0.125, flip: float = 0.5, strength: float = 0.0, evaluate: str = "student",
        unlabelled: Iterable[Any] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if weight < 0 or not 0 <= decay < 1 or not 0 <= ramp <= 1 or temperature <= 0:
            raise PlanishError(
                f"consistency has weight {weight}, decay {decay}, ramp {ramp} and temperature {temperature}: "
                f"decay lies in [0, 1), ramp in [0, 1], the weight is not negative and the temperature is positive"
            )
        if evaluate not in EVALUATED:
            raise PlanishError(f"consistency hands back the {evaluate!r}: choose {' or '.join(EVALUATED)}")
        self.weight, self.ramp, self.decay, self.temperature = weight, ramp, decay, temperature
        self.shift, self.flip, self.strength, self.evaluate = shift, flip, strength, evaluate
        self.unlabelled, self.seed = unlabelled, seed
        self.count = 0
        self.more: Endless | None = None
        self.target: Tensor | None = None
        self.further: Any = None  # the images without labels of this step
        self.extra: tuple[Any, Tensor] | None = None

    def start(self, run: Run) -> None:
        self.average = copy.deepcopy(run.model).requires_grad_(False).eval()
        self.count = 0
        if self.unlabelled is not None:
            loader = self.unlabelled
            if isinstance(loader, Sized) and len(loader):
                loader = SharedLoader(loader, run.accelerator.process_index, run.accelerator.num_processes)
            self.more = Endless(loader, self.seed, run.accelerator.device)

    def view(self, inputs: Any, strength: float = 0.0) -> Any:
        """Another view of every image in the inputs: of the tensors (N, C, H, W), also those in a mapping."""
        seen = []

        def change(tensor: Tensor) -> Tensor:
            if tensor.dim() != 4 or not tensor.is_floating_point():
                return tensor
            seen.append(1)
            return distort(random_view(tensor, self.shift, self.flip), strength)

        changed = map_tensors(inputs, change)
        if not seen:
            raise PlanishError("consistency needs batches with images (N, C, H, W): it compares two views of them")
        return changed

    @torch.no_grad()
    def taught(self, run: Run, inputs: Any) -> Tensor:
        """The teacher's logits."""
        with run.accelerator.autocast():
            return logits_of(call_model(self.average, inputs)).float()

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        if self.more is not None:
            self.further = to_device(self.more.get(run.step), run.accelerator.device)

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        # here and not in `loss`, which is called twice a step if the gradient is taken at a perturbed point
        self.target = self.taught(run, self.view(inputs))
        if self.further is not None:
            start, stop = bounds(size_of(self.further), run.parts, run.part)
            images = cut(self.further, start, max(stop, start + 1))
            self.extra = self.view(images, self.strength), self.taught(run, images)

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        assert self.target is not None
        task = task_of(run.model, logits)
        total = divergence(logits, self.target, self.temperature, task)
        if self.extra is not None:
            view, target = self.extra
            seen = logits_of(call_model(run.wrapped, view))
            total = total + divergence(seen, target, self.temperature, task)
        return self.weight * ramp_up(run.progress, self.ramp) * total

    def after_step(self, run: Run) -> None:
        self.target, self.further, self.extra = None, None, None
        self.count += 1
        follow(self.average, run.model, min((1 + self.count) / (10 + self.count), self.decay))

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        if self.evaluate == "teacher" and self.count and not run.failed:
            run.model.load_state_dict(self.average.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.count = state["count"]


@dataclass(frozen=True)
class CR(Method):
    """Consistency with a quantized moving average over LSQ; takes images without labels.

    Attributes:
        weight: of the consistency, once the ramp is over.
        ramp: share of the run over which the weight rises.
        decay: of the teacher's moving average, at most.
        sharpness: temperature of both distributions.
        shift: how far the second view is shifted at most, as a share of the side.
        flip: probability with which the second view is mirrored.
        strength: in [0, 1], how far what the student sees of an unlabelled image is distorted.
        evaluate: which weights are handed back: the ``student``'s (their average, if the settings average) or the
            ``teacher``'s.
    """

    name: ClassVar[str] = "cr"
    summary: ClassVar[str] = "agreement with its own moving average on another view, also without labels"
    paper: ClassVar[str] = "in the manner of Pang et al. 2024, arXiv 2402.13497"
    takes_unlabelled: ClassVar[bool] = True

    weight: float = 0.3
    ramp: float = 0.3
    decay: float = 0.999
    sharpness: float = 1.0
    shift: float = 0.125
    flip: float = 0.5
    strength: float = 0.0
    evaluate: str = "student"

    @property
    def averaging_until(self) -> float:
        return 0.0 if self.weight and self.evaluate == "teacher" else 1.0

    def ingredients(self, context: Context) -> list[Ingredient]:
        consistency = ConsistencyRegularization(
            self.weight, ramp=self.ramp, decay=self.decay, temperature=self.sharpness, shift=self.shift,
            flip=self.flip, strength=self.strength, evaluate=self.evaluate,
            unlabelled=context.unlabelled, seed=context.seed,
        )  # fmt: skip
        return [*super().ingredients(context), *([consistency] if self.weight else [])]
