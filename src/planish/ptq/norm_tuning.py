"""SandwichQuant: the affine parameters of norms are tuned before the network is quantized, and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from planish.errors import PlanishError
from planish.network.batches import first_image
from planish.network.folding import find_pairs
from planish.network.taps import taps_of
from planish.ptq.affines import Affines, norm_parameters
from planish.ptq.outputs import keep_float, layers_of
from planish.ptq.passes import Calibration
from planish.ptq.trial import rounded_copy
from planish.ptq.tuning import Tuning

LAYERS = ("folded", "all", "none")


@dataclass(frozen=True)
class TuneNorms(Tuning):
    """Tune the affine parameters of norms in the quantized network (SandwichQuant's second half, Xia and Pang 2026,
    arXiv 2608.24173), after ``Round``.

    Everything but the affines is frozen, the integers of the weights too; the float network's outputs are the target,
    so no labels are needed. Where BatchNorm was folded into a layer, its affine lives on as a factor and a shift of
    each output channel: the factor ends up in the scale of the weight's grid, the shift in the bias. Gradients pass
    activation quantizers by the straight-through estimator. If the distance on held-out images is not lower than
    before, nothing is changed and the log says so.

    Attributes:
        layers: which layers get a factor and a shift: those with a "folded" BatchNorm, "all" quantized ones, or "none".

    Raises:
        PlanishError: an option is out of range, ``images`` is empty.
    """

    layers: str = "folded"
    name = "tune-norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in LAYERS:
            raise PlanishError(f"layers is {self.layers!r}: choose one of {', '.join(LAYERS)}.")

    def __call__(self, calibration: Calibration) -> None:
        keep_float(calibration)
        model, pairs = calibration.model, _folded(calibration)
        layers = [] if self.layers == "none" else layers_of(calibration)
        if self.layers == "folded":
            layers = [layer for layer in layers if layer.path in pairs]
        affines = Affines(norm_parameters(model, but=pairs.values()), layers)
        if not affines.parameters():
            _note(calibration, self.name, "the network has no norm whose affine parameters could be tuned")
            return
        before, after = self.tune(model, affines, *self.split(calibration))
        if after < before:
            affines.bake()
        _report(calibration, self.name, before, after)


@dataclass(frozen=True)
class PrepareNorms(Tuning):
    """Tune the affine parameters of norms before the network is quantized (SandwichQuant's first half, Xia and Pang
    2026, arXiv 2608.24173): the first pass of a list.

    A throw-away copy is rounded to nearest and its affines are tuned as :class:`TuneNorms` does; they alone go into the
    float network, which is then quantized from scratch. The affines stay as they were, and the log says so, if the
    network with the new ones, rounded to nearest, is not closer to the given one on held-out images.

    Raises:
        PlanishError: an option is out of range, ``images`` is empty, or the network has taps already.
    """

    lr: float = 3e-3
    name = "prepare-norms"

    def __call__(self, calibration: Calibration) -> None:
        model = calibration.model
        if any(True for _ in taps_of(model)):
            raise PlanishError("prepare-norms works on the float network: put it first in the list of passes")
        calibration.float_changes()
        trial, pairs = rounded_copy(calibration)
        layers = [layer for layer in layers_of(trial) if layer.path in pairs]
        affines = Affines(norm_parameters(trial.model, but=pairs.values()), layers)
        if not affines.parameters():
            _note(calibration, self.name, "the network has no norm whose affine parameters could be tuned")
            return
        batches, held = self.split(calibration)
        before, _ = self.tune(trial.model, affines, batches, held)
        saved = {name: parameter.detach().clone() for name, parameter in norm_parameters(model).items()}
        with torch.no_grad():
            _copy_affines(model, affines, pairs)
            after = self.distance(rounded_copy(calibration)[0].model, held)
            if not after < before:
                for name, parameter in norm_parameters(model).items():
                    parameter.copy_(saved[name])
        _report(calibration, self.name, before, after)


def _copy_affines(model: nn.Module, affines: Affines, pairs: Mapping[str, str]) -> None:
    norms = norm_parameters(model)
    for name, value in affines.norms.items():
        norms[name].copy_(value)
    for path, output in affines.outputs.items():  # factor * (weight * x + bias) + shift
        norm: Any = model.get_submodule(pairs[path])
        if norm.affine:
            factor = 1.0 if output.factor is None else output.factor
            norm.weight.mul_(factor)
            norm.bias.mul_(factor).add_(output.shift)


def _folded(calibration: Calibration) -> dict[str, str]:
    """Which BatchNorm of the given network was folded into which layer."""
    if calibration.given is None:
        return {}
    now = dict(calibration.model.named_modules())

    def neutral(path: str) -> bool:
        norm = now.get(path)
        return isinstance(norm, _BatchNorm) and norm.running_mean is not None and not bool(norm.running_mean.any())

    return {
        layer: norm for layer, norm in find_pairs(calibration.given, first_image(calibration.batches[0]))
        if layer in now and neutral(norm)
    }  # fmt: skip


def _note(calibration: Calibration, name: str, text: str) -> None:
    calibration.note(name, text)


def _report(calibration: Calibration, name: str, before: float, after: float) -> None:
    kept = "" if after < before else "; that is not lower, so everything was put back"
    _note(calibration, name, f"distance from the float network on held-out images {before:.4g} -> {after:.4g}{kept}")
