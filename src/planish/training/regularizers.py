"""Penalties of the task's gradient or of the weights, against which noise is compared: gradient-L1 and kurtosis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.errors import PlanishError
from planish.task import task_loss, task_of
from planish.training.ingredients import Compute, Ingredient
from planish.training.loop import Run

UNIFORM = 1.8  # kurtosis of the uniform law


def kurtosis(weight: Tensor) -> Tensor:
    """``E[((w - mean) / std)^4]`` over all entries; 3 for a Gaussian, 1.8 for a uniform law. 0 for a constant."""
    centred = weight - weight.mean()
    return (centred / centred.square().mean().clamp(min=1e-24).sqrt()).pow(4).mean()


class Kurtosis(Ingredient):
    """``weight * mean over layers of (kurtosis(w) - target)^2`` (KURE, Shkolnik et al. 2020, arXiv 2002.07686, eq. 9).

    Weights that are spread evenly over their range have no outliers that stretch a grid, and their rounding error
    depends least on its step.

    Raises:
        PlanishError: a weight that is not positive.
    """

    def __init__(self, weight: float = 1.0, target: float = UNIFORM) -> None:
        _positive("kurtosis regularization", weight)
        self.weight, self.target = weight, target

    def loss(self, run: Run, inputs: object, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        found = [kurtosis(p) for p in run.model.parameters() if p.dim() > 1 and p.requires_grad]
        return self.weight * (torch.stack(found) - self.target).square().mean() if found else None


class GradientL1(Ingredient):
    """``weight * |dL/dw|_1`` over all weights, L the batch's task loss (Alizadeh et al. 2020, arXiv 2002.07520).

    To first order, that is what an error of given largest size in every weight can add to the loss, at any number of
    bits. The penalty is differentiated through the gradient, which costs about as much as two more steps. The paper
    also penalises the gradient of activations; here only weights are counted.

    Raises:
        PlanishError: a weight that is not positive; images without labels.
    """

    def __init__(self, weight: float = 0.05) -> None:
        _positive("gradient-L1 regularization", weight)
        self.weight = weight

    def around(self, run: Run, compute: Compute) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            return compute()

    def loss(self, run: Run, inputs: object, labels: Tensor | None, logits: Tensor) -> Tensor:
        if labels is None:
            raise PlanishError("gradient-L1 regularization needs labels, but the loader yields images only")
        weights = [p for p in run.model.parameters() if p.dim() > 1 and p.requires_grad]
        loss = task_loss(task_of(run.model, logits), logits, labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        return self.weight * torch.stack([g.abs().sum() for g in gradients if g is not None]).sum()


def _positive(what: str, weight: float) -> None:
    if not weight > 0:
        raise PlanishError(f"the weight of {what} is {weight}: it is positive; leave the term out instead")
