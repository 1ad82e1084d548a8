"""What a training method is: its quantizers, and its ingredients for the one loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from planish.errors import PlanishError
from planish.network import Assignment, Product, Site
from planish.network.rebuilding import has_turned_channels
from planish.qat.published import Recipe
from planish.quantizers import TrainableQuantizer
from planish.scheme import Scheme
from planish.task import FEATURES, task_of
from planish.training import Distillation, Ingredient, TaskLoss


@dataclass
class Context:
    """What the ingredients of a method are made from."""

    model: nn.Module  # the network in training, with its quantizers in place
    given: nn.Module  # the network in float, as it was given: the teacher
    plan: Assignment
    taps: dict[str, TrainableQuantizer]  # by the name of their site
    seed: int = 0
    unlabelled: Iterable[Any] | None = None  # batches of images without labels

    def teacher(self) -> nn.Module:
        """A copy of the given network, for one ingredient to hold."""
        return copy.deepcopy(self.given)

    def channel_teacher(self, what: str) -> nn.Module:
        """The same, for an ingredient that compares the outputs of layers channel by channel.

        Raises:
            PlanishError: the network in training was rotated and the given one was not; ``what`` compares.
        """
        if has_turned_channels(self.model) and not has_turned_channels(self.given):
            raise PlanishError(
                f"{what} compares layers with those of the network in float channel by channel, and the start was "
                "rotated (rotate does so, and on transformers fast and best-vit), which mixes channels: start from "
                "the network in float or from a method without rotation, or train by kd"
            )
        return self.teacher()

    def weights(self) -> dict[str, tuple[Site, nn.Parameter, TrainableQuantizer]]:
        """The parameters that are quantized, with their sites and quantizers."""
        found = {}
        for site, _ in self.plan.quantized():
            if site.parameter:
                owner = self.model.get_submodule(site.owner)
                found[site.name] = (site, owner._parameters[site.slot], self.taps[site.name])
        return found  # type: ignore[return-value]

    def layers(self) -> list[Product]:
        """The products of a quantized weight with an activation, in the order of execution."""
        formats = self.plan.formats
        return [p for p in self.plan.products if p.weight is not None and formats[p.weight.name] is not None]


@dataclass(frozen=True)
class Method:
    """Learned step sizes, and the base of every other method; a field is an option of the method.

    Attributes:
        weights: how weights are quantized: a key of ``planish.qat.prepare.WEIGHTS``. The first and last layer, where
            they have a width of their own, always learn their step.
        activations: how activations are quantized: a key of ``planish.qat.prepare.ACTIVATIONS``.
        init: where learned steps start: ``calibrated``, or ``lsq`` or ``lsq+`` for the papers' own.
        task: weight of the cross-entropy with the labels.
        label_smoothing: share of the target that is spread evenly over all classes.
        distillation: weight of the divergence from the float network's logits.
        temperature: of both distributions in the distillation.
        pull: delta of element-wise gradient scaling (EWGS); 0 for the straight-through estimator.
    """

    name: ClassVar[str] = "lsq"
    summary: ClassVar[str] = "learned step sizes, zero points as calibrated"
    paper: ClassVar[str] = "Esser et al. 2020, arXiv 1902.08153"
    takes_unlabelled: ClassVar[bool] = False  # whether it can use images without labels
    recipes: ClassVar[Mapping[str, Recipe]] = {}  # what its authors trained with, by the name of the network

    weights: str = "lsq"
    activations: str = "lsq"
    init: str = "calibrated"
    task: float = 1.0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0
    pull: float = 0.0

    def adapt(self, scheme: Scheme) -> Scheme:
        """The scheme with the grids that the method's quantizers have."""
        if self.weights == "statsq":
            return replace(scheme, weights=replace(scheme.weights, symmetric=True, half_integer=True))
        if self.weights == "dorefa":
            weights = replace(scheme.weights, symmetric=True, half_integer=True, granularity="tensor")
            return replace(scheme, weights=weights)
        return scheme

    @property
    def averaging_until(self) -> float:
        """The share of the run after which weights are no longer averaged; 0: they are not averaged at all."""
        return 1.0

    def restructure(self, model: nn.Module) -> list[str]:
        """Rebuild parts of the network, in place, before it is watched and quantized; returns their paths."""
        return []

    def ingredients(self, context: Context) -> list[Ingredient]:
        """What is minimised, and what else happens in a step.

        Raises:
            PlanishError: an option has a value that means nothing.
        """
        if min(self.task, self.distillation, self.pull) < 0 or self.temperature <= 0:
            raise PlanishError(
                f"{self.name} has task={self.task}, distillation={self.distillation}, pull={self.pull} and "
                f"temperature={self.temperature}: weights are not negative, and the temperature is positive"
            )
        if not 0 <= self.label_smoothing < 1:
            raise PlanishError(f"{self.name} has label_smoothing={self.label_smoothing}: it lies in [0, 1)")
        parts: list[Ingredient] = []
        features = task_of(context.model) is FEATURES  # which nothing but the float network's can be compared with
        distillation = self.distillation or (self.task if features else 0.0)
        if self.task and not features:
            parts.append(TaskLoss(self.task, self.label_smoothing))
        if distillation:
            parts.append(Distillation(context.teacher(), distillation, self.temperature))
        return parts
