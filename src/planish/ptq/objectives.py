"""What the output of a unit is compared by, while its roundings are learned.

Every objective is a function of the unit's output z, its target y (the output in the float network) and the places of
these images among the calibration images. The distances are sums over the values of an image, and means over images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.ptq.flow import Flow, Suffix, UnitData

FEATURE, LOCAL = "feature", "local"
TEMPERATURE = 4.0  # of the prediction difference (PD-Quant, section 4)
LOCAL_WEIGHT = 2.0  # of the local error beside the feature's (GLF-Q; 1 to 4 are equal there)
CHUNK = 64  # images that gradients are taken of at once


class Objective(Protocol):
    """The distance of a unit's output ``z`` from its target ``y``, for the images at some ``places``: a scalar."""

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor: ...


def squared_error(z: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """``sum weight (z - y)^2`` over the values of an image, as a mean over the images."""
    squared = (z - y).square()
    return (squared if weight is None else squared * weight).sum() / len(z)


class Local:
    """The squared error of the unit's output (AdaRound, QDrop)."""

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor:
        return squared_error(z, y)


class Fisher:
    """The squared error weighted by squared gradients of the loss, image by image (BRECQ, arXiv 2102.05426, eq. 10).

    The loss is the divergence of the logits from the float network's; its gradients are those at the output of the
    unit as it is rounded at first.
    """

    def __init__(self, flow: Flow, index: int, data: UnitData, suffix: Suffix) -> None:
        _, gradients = output_gradients(flow, index, data, suffix)
        self.weight = gradients.square()
        self.weight /= self.weight.mean().clamp(min=1e-30)

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor:
        return squared_error(z, y, self.weight[places].to(z.device))


class LeastSquaresHessian:
    """The squared error weighted by the diagonal Hessian that best explains the gradients (LS-ViT, CVPR 2026).

    With g the gradient of the loss at the rounded output and d its difference from the exact one, ``g = H d`` holds to
    first order, and the least-squares diagonal over the images is ``H_i = mean(g_i d_i) / mean(d_i^2)``.
    """

    def __init__(self, flow: Flow, index: int, data: UnitData, suffix: Suffix) -> None:
        outputs, gradients = output_gradients(flow, index, data, suffix)
        self.weight = least_squares_diagonal(gradients, outputs - data.target)

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor:
        return squared_error(z, y, self.weight.to(z.device))


def least_squares_diagonal(gradients: Tensor, differences: Tensor) -> Tensor:
    """``mean(g d) / mean(d^2)`` over the first dimension, at least a hundredth of its mean and with mean 1.

    A negative or vanishing entry would let an error grow without a price.
    """
    found = (gradients * differences).mean(0) / differences.square().mean(0).clamp(min=1e-30)
    found = found.clamp(min=0.0)
    found = found / found.mean().clamp(min=1e-30)
    return found.clamp(min=0.01)


class PredictionDifference:
    """The local error and the divergence of the logits behind it (PD-Quant, arXiv 2212.07048), each from 1 on."""

    def __init__(self, flow: Flow, index: int, data: UnitData, suffix: Suffix) -> None:
        self.suffix, self.first = suffix, First()

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor:
        logits = self.suffix.logits(z)
        kl = self.suffix.task.divergence(self.suffix.reference[places].to(z.device), logits, TEMPERATURE)
        return self.first("logits", kl) + self.first(LOCAL, squared_error(z, y))


class GlobalLocalFeature:
    """The error of the features before the classifier, and the local one, each from 1 on (GLF-Q, 2026)."""

    def __init__(self, flow: Flow, index: int, data: UnitData, suffix: Suffix) -> None:
        self.suffix, self.first = suffix, First()

    def __call__(self, z: Tensor, y: Tensor, places: Tensor) -> Tensor:
        features = squared_error(self.suffix.features(z), self.suffix.reference_features[places].to(z.device))
        return self.first(FEATURE, features) + LOCAL_WEIGHT * self.first(LOCAL, squared_error(z, y))


class First:
    """Divides every term by the first value that it had."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        scale = self.values.setdefault(name, max(value.item(), 1e-30))
        return value / scale


def output_gradients(flow: Flow, index: int, data: UnitData, suffix: Suffix) -> tuple[Tensor, Tensor]:
    """The output of the unit as it is rounded now, and the gradient there of the divergence of the logits from the
    float network's: two tensors with a row an image."""
    outputs, gradients = torch.empty_like(data.target), torch.empty_like(data.target)
    for places in torch.arange(len(data.target)).split(CHUNK):
        with torch.no_grad():
            z = flow.run("student", index, data.quantized[places].to(suffix.device))
        z.requires_grad_()
        with torch.enable_grad():
            loss = suffix.task.divergence(suffix.reference[places].to(z.device), suffix.logits(z)) * len(places)
            (gradient,) = torch.autograd.grad(loss, z)
        outputs[places], gradients[places] = z.detach().to(outputs.device), gradient.to(outputs.device)
    return outputs, gradients


OBJECTIVES: dict[str, Callable[[Flow, int, UnitData, Suffix], Objective] | None] = {
    "local": None,
    "fisher": Fisher,
    "pd": PredictionDifference,
    "lsh": LeastSquaresHessian,
    "glf": GlobalLocalFeature,
}


def check_objective(name: str) -> None:
    """Raise :class:`PlanishError` with the names that exist."""
    if name not in OBJECTIVES:
        raise PlanishError(f"the loss of the reconstruction is {name!r}: choose one of {', '.join(OBJECTIVES)}")


def make_objective(name: str, flow: Flow, index: int, data: UnitData, suffix: Suffix | None) -> Objective:
    """The objective of a unit; the local one where nothing but the unit can be run, or nothing follows it."""
    kind = OBJECTIVES[name]
    if kind is None or suffix is None or not flow.units[index].link:
        return Local()
    return kind(flow, index, data, suffix)
