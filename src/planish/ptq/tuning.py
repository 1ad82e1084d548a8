"""Tuning a few parameters of the quantized network by distillation from the float network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import call_model, join, logits_of, map_tensors, split_batch, to_device
from planish.network.modes import evaluating
from planish.ptq.affines import Affines
from planish.ptq.passes import Calibration
from planish.ptq.precision import check_precision, products_in
from planish.task import CLASSES, Task, task_of

CHECKS = 10  # times that the distance on the held-out images is taken; the best of the checks is kept


def divergence(logits: Tensor, target: Tensor, temperature: float, task: Task = CLASSES) -> Tensor:
    """``T^2`` times the task's divergence at that temperature, for classes ``KL(softmax(target / T) || softmax(logits /
    T))``: the mean over the images; logits (B, classes)."""
    return temperature**2 * task.divergence(target, logits, temperature)


@dataclass(frozen=True)
class Images:
    """Inputs of N images and the float network's logits for them."""

    inputs: Any
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, which: Tensor) -> Images:
        return Images(map_tensors(self.inputs, lambda t: t[which.to(t.device)]), self.targets[which])

    def shuffled(self, batch: int, generator: torch.Generator) -> Iterator[Images]:
        """Batches without end; each epoch leaves out the images that do not fill one."""
        size = min(batch, len(self))
        while True:
            order = torch.randperm(len(self), generator=generator)
            yield from (self[part] for part in order.split(size) if len(part) == size)


def all_images(calibration: Calibration) -> Images:
    """The calibration images."""
    return Images(join(calibration.batches), torch.cat(calibration.reference).to(_device(calibration)))


def _device(calibration: Calibration) -> torch.device:
    return next(calibration.model.parameters()).device


@dataclass(frozen=True)
class Tuning:
    """Distillation from the float network, and its options.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate of AdamW (no weight decay); it falls to 0 along a cosine.
        batch: images of a step.
        temperature: of the distillation loss ``T^2 KL(float || quantized)``.
        clip: norm to which the gradient is clipped.
        images: batches of images to tune on (labels are not read), gone through as often as needed, in place of the
            calibration images, which then all judge the result.
        held: share of the calibration images that are held out to judge the result.
        seed: of the order of the images and of the choice of those held out.
        precision: in which products are computed meanwhile (:func:`~planish.ptq.precision.products_in`).
    """

    steps: int = 200
    lr: float = 1e-2
    batch: int = 64
    temperature: float = 4.0
    clip: float = 1.0
    images: Iterable[Any] | None = None
    held: float = 0.1
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        for option in ("steps", "batch"):
            if getattr(self, option) < 1:
                raise PlanishError(f"{option} is {getattr(self, option)}: norm tuning takes at least 1.")
        if not 0 < self.held < 1:
            raise PlanishError(f"held is {self.held}: give a share of the calibration images between 0 and 1.")
        for option in ("lr", "temperature", "clip"):
            if not 0 < getattr(self, option) < math.inf:
                raise PlanishError(f"{option} is {getattr(self, option)}: give a number above 0.")

    def split(self, calibration: Calibration) -> tuple[Iterator[Images], Images]:
        """Batches to tune on, without end, and the images that judge the result: a share of the calibration images, or
        all of them where there are others to tune on."""
        if self.images is not None:
            return self._stream(calibration.given, _device(calibration)), all_images(calibration)
        generator = torch.Generator().manual_seed(self.seed)
        fit, held = self.parts(calibration, generator)
        return fit.shuffled(self.batch, generator), held

    def parts(self, calibration: Calibration, generator: torch.Generator) -> tuple[Images, Images]:
        """The calibration images but for the share that is held out, and that share; of one image, twice this one."""
        every = all_images(calibration)
        order = torch.randperm(len(every), generator=generator)
        held = max(1, int(len(every) * self.held)) if len(every) > 1 else 0
        fit = every[order[held:]]
        return fit, every[order[:held]] if held else fit

    def _stream(self, teacher: nn.Module | None, device: torch.device) -> Iterator[Images]:
        assert self.images is not None
        if teacher is None:
            raise PlanishError("images need the float network to learn from: pass them to planish.quantize")
        while True:
            used = False
            for batch in self.images:
                used = True
                inputs = to_device(split_batch(batch)[0], device)
                with torch.no_grad(), evaluating(teacher):
                    targets = logits_of(call_model(teacher, inputs))
                yield Images(inputs, targets)
            if not used:
                raise PlanishError("images gave no batch: give a loader that can be gone through several times")

    @torch.no_grad()
    def distance(self, model: nn.Module, images: Images) -> float:
        """Mean divergence of the model's outputs from the float network's."""
        total = 0.0
        for part in torch.arange(len(images)).split(max(self.batch, 64)):
            some = images[part]
            logits = logits_of(call_model(model, some.inputs))
            task = task_of(model, logits)
            total += len(some) * float(divergence(logits, some.targets, self.temperature, task))
        return total / len(images)

    def tune(self, model: nn.Module, affines: Affines, batches: Iterator[Images], held: Images) -> tuple[float, float]:
        """Train the affines in place; returns the distance before and after. They are as before if it is not lower."""
        model.eval()
        parameters = affines.parameters()
        optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (1 + math.cos(math.pi * s / self.steps)) / 2)
        checks = {round(self.steps * i / CHECKS) for i in range(1, CHECKS + 1)}
        with torch.inference_mode(False), torch.enable_grad(), affines.applied():
            before = least = self.distance(model, held)
            best = affines.values()
            for step in range(1, self.steps + 1):
                some = next(batches)
                optimizer.zero_grad()
                with products_in(self.precision):
                    logits = logits_of(call_model(model, some.inputs))
                    loss = divergence(logits, some.targets, self.temperature, task_of(model, logits))
                    loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
                schedule.step()
                if step in checks and (now := self.distance(model, held)) < least:
                    least, best = now, affines.values()
            optimizer.zero_grad()
            affines.put(best)
        return before, least
