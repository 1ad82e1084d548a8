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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from planish.data.views import random_view
from planish.errors import PlanishError
from planish.network.batches import call_model, logits_of, map_tensors, split_batch, to_device
from planish.qat.method import Context, Method
from planish.training import Ingredient
from planish.training.engine import begin_epoch
from planish.training.loop import Run


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, the mean over the images; no gradient to the teacher."""
    log_student = F.log_softmax(student.float() / temperature, -1)
    target = F.softmax(teacher.detach().float() / temperature, -1)
    return F.kl_div(log_student, target, reduction="batchmean")


def ramp_up(progress: float, length: float) -> float:
    """``exp(-5 (1 - min(t / T, 1))^2)``: from e^-5 at the start to 1 at ``length`` of the run (Laine and Aila 2017)."""
    return math.exp(-5 * (1 - min(progress / length, 1.0)) ** 2) if length > 0 else 1.0


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """``teacher <- decay teacher + (1 - decay) student`` for weights, step sizes and BatchNorm statistics.

    Other buffers (counts, fixed zero points) are copied.
    """
    torch._foreach_lerp_([p.detach() for p in teacher.parameters()], list(student.parameters()), 1 - decay)
    for (name, mine), theirs in zip(teacher.named_buffers(), student.buffers(), strict=True):
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            mine.lerp_(theirs, 1 - decay)
        else:
            mine.copy_(theirs)


class Endless:
    """Batches without end, at a position that the step alone decides, so that an interrupted run goes on as it was."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        if not isinstance(loader, Sized) or len(loader) == 0:
            raise PlanishError("the unlabelled images come from a loader with a length that yields at least one batch")
        self.loader, self.seed, self.length = loader, seed, len(loader)
        self.at = -1
        self.batches: Iterator[Any] = iter(())

    def get(self, step: int) -> Any:
        epoch, index = divmod(step, self.length)
        if step != self.at or index == 0:
            with torch.random.fork_rng(devices=[]):  # what else the step draws does not depend on where it resumed
                begin_epoch(self.loader, epoch, self.seed)
                self.batches = islice(iter(self.loader), index, None)
                batch = next(self.batches)
        else:
            batch = next(self.batches)
        self.at = step + 1
        return split_batch(batch)[0]


class ConsistencyRegularization(Ingredient):
    """``weight(t) * KL(teacher(view 2) || student(view 1))``, the teacher being a moving average of the student.

    View 1 of the labelled images is the batch as it comes; view 2 of it is another random shift and reflection. Images
    without labels are given to the teacher as they come and to the student in a second view, which costs a second
    forward and backward pass. Their labels, if the loader yields any, are not read.

    Args:
        weight: the weight that the ramp reaches.
        ramp: share of the run over which it rises.
        decay: of the average, at most; after t steps it is ``min(1 - 1 / (t + 1), decay)``.
        temperature: of both distributions.
        shift, flip: see :func:`planish.data.views.random_view`.
        unlabelled: batches of further images.
    """

    def __init__(
        self, weight: float = 1.0, *, ramp: float = 0.3, decay: float = 0.999, temperature: float = 1.0,
        shift: float = 0.125, flip: float = 0.5, unlabelled: Iterable[Any] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 <= decay < 1 or not 0 <= ramp <= 1 or temperature <= 0:
            raise PlanishError(
                f"consistency has decay {decay}, ramp {ramp} and temperature {temperature}: decay lies in [0, 1), "
                f"ramp in [0, 1], and the temperature is positive"
            )
        self.weight, self.ramp, self.decay, self.temperature = weight, ramp, decay, temperature
        self.shift, self.flip, self.unlabelled, self.seed = shift, flip, unlabelled, seed
        self.count = 0

    def start(self, run: Run) -> None:
        self.average = copy.deepcopy(run.model).requires_grad_(False).eval()
        self.count = 0
        if self.unlabelled is not None:
            loader = self.unlabelled
            if isinstance(loader, DataLoader):
                loader = run.accelerator.prepare_data_loader(loader)
            self.more = Endless(loader, self.seed)

    def view(self, inputs: Any) -> Any:
        """Another view of every image in the inputs."""
        seen = []

        def change(tensor: Tensor) -> Tensor:
            if tensor.dim() != 4 or not tensor.is_floating_point():
                return tensor
            seen.append(1)
            return random_view(tensor, self.shift, self.flip)

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
        self.target = self.taught(run, self.view(inputs))

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        total = divergence(logits, self.target, self.temperature)
        if self.unlabelled is not None:
            images = to_device(self.more.get(run.step), run.accelerator.device)
            theirs = self.taught(run, images)
            ours = logits_of(call_model(run.wrapped, self.view(images))).float()
            total = total + divergence(ours, theirs, self.temperature)
        return self.weight * ramp_up(run.progress, self.ramp) * total

    def after_step(self, run: Run) -> None:
        self.count += 1
        follow(self.average, run.model, min(1 - 1 / (self.count + 1), self.decay))

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
    """

    name: ClassVar[str] = "cr"
    summary: ClassVar[str] = "agreement with its own moving average on another view, also without labels"
    paper: ClassVar[str] = "in the manner of Pang et al. 2024, arXiv 2402.13497"

    weight: float = 1.0
    ramp: float = 0.3
    decay: float = 0.999
    sharpness: float = 1.0
    shift: float = 0.125
    flip: float = 0.5

    def ingredients(self, context: Context) -> list[Ingredient]:
        consistency = ConsistencyRegularization(
            self.weight, ramp=self.ramp, decay=self.decay, temperature=self.sharpness, shift=self.shift,
            flip=self.flip, unlabelled=context.unlabelled, seed=context.seed,
        )  # fmt: skip
        return [*super().ingredients(context), *([consistency] if self.weight else [])]
