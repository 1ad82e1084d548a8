"""Terms of the objective: the task, distillation from a teacher, and the output error that DNQ minimises."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import call_model, logits_of
from planish.network.modes import frozen_statistics
from planish.training.ingredients import Ingredient
from planish.training.loop import Run


class TaskLoss(Ingredient):
    """``weight * cross_entropy(logits, labels)``; labels are class indices."""

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        if labels is None:
            raise PlanishError(
                "the task loss needs labels, but the loader yields images only; use distillation instead"
            )
        return self.weight * F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class Distillation(Ingredient):
    """``weight * T^2 * KL(teacher / T || student / T)`` (Hinton et al. 2015, arXiv 1503.02531); reads no labels."""

    def __init__(self, teacher: nn.Module, weight: float = 1.0, temperature: float = 1.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature
        self._target: Tensor | None = None

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        with torch.no_grad(), run.accelerator.autocast():
            self._target = logits_of(call_model(self.teacher, inputs)).float()

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        assert self._target is not None
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, -1), F.log_softmax(self._target / t, -1), log_target=True, reduction="batchmean"
        )
        return self.weight * t * t * divergence


class OutputError(Ingredient):
    """``weight * mean |f(x; W) - f(x + e_a; W + e_w)|^2``: the perturbed outputs against the clean ones of the same
    network (the objective of arXiv 2511.01462). ``quiet(model)`` is a context in which the perturbations are off.
    """

    def __init__(self, weight: float, quiet: Callable[[nn.Module], AbstractContextManager[Any]]) -> None:
        self.weight, self.quiet = weight, quiet
        self._clean: Tensor | None = None

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        # the random state is given back, so that dropout drops the same in both passes
        device = run.accelerator.device
        with (
            torch.no_grad(), run.accelerator.autocast(), self.quiet(run.model), frozen_statistics(run.model),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):  # fmt: skip
            self._clean = logits_of(call_model(run.model, inputs)).float()

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        assert self._clean is not None
        return self.weight * F.mse_loss(logits, self._clean)
