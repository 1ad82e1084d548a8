"""Terms of the objective: the task, distillation from a teacher, and the output error that DNQ minimises."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import call_model, logits_of
from planish.network.faults import BadBatch, label_fault, range_fault
from planish.task import FEATURES, LABELS, task_loss, task_of
from planish.training.ingredients import Ingredient
from planish.training.loop import Run


class TaskLoss(Ingredient):
    """``weight`` times the loss of the task (:mod:`planish.task`): the cross-entropy with class indices, or the binary
    one with (N, C) labels."""

    sharded = True

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing
        self._classes: int | None = None

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        # here nothing is under way on an accelerator yet, so waiting for the labels costs nothing
        if labels is not None and self._classes is not None:
            _refuse(range_fault(labels, self._classes))

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        if labels is None:
            raise PlanishError(
                "the task loss needs labels, but the loader yields images only; use distillation instead"
            )
        task = task_of(run.model, logits)
        if task is FEATURES:
            raise PlanishError("features are neither right nor wrong: train them by distillation, without a task loss")
        if task is not LABELS:
            _refuse(label_fault(labels, logits))
        if self._classes is None:
            self._classes = max(2, logits.shape[-1]) if task is LABELS else logits.shape[-1]
            _refuse(range_fault(labels, self._classes))
        return self.weight * task_loss(task, logits, labels, self.label_smoothing)


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise BadBatch(fault)


class _Taught(Ingredient):
    """Holds a frozen network and its outputs for the images at hand; reads no labels."""

    sharded = True

    def __init__(self, teacher: nn.Module, weight: float) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight = weight
        self._target: Tensor | None = None

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        with torch.no_grad(), run.accelerator.autocast():
            self._target = logits_of(call_model(self.teacher, inputs)).float()

    @property
    def target(self) -> Tensor:
        """The teacher's logits for the images at hand."""
        assert self._target is not None
        return self._target


class Distillation(_Taught):
    """``weight * T^2 * KL(teacher / T || student / T)`` (Hinton et al. 2015, arXiv 1503.02531); reads no labels.

    The divergence is that of the task: of a softmax, of a sigmoid for each label, or the distance of features.
    """

    def __init__(self, teacher: nn.Module, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(teacher, weight)
        self.temperature = temperature

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        t = self.temperature
        return self.weight * t * t * task_of(run.model, logits).divergence(self.target, logits, t)


class OutputError(_Taught):
    """``weight * mean |f(x; W_0) - f(x + e_a; W + e_w)|^2``: the perturbed outputs against those of the full-precision
    network ``W_0`` as it was given (the objective of arXiv 2511.01462, as far as it is known).

    Read with the clean outputs of the network in training as the target, the objective runs away: clipping holds the
    perturbed outputs back, so the clean ones grow ahead of them (measured, also at a weight of 0.1).
    """

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        return self.weight * F.mse_loss(logits, self.target)
