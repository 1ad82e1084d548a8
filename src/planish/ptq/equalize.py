"""Cross-layer equalization: channels of consecutive layers get equal ranges, and the network computes the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import first_image
from planish.network.chains import Chain, find_chains
from planish.network.folding import outputs, same_outputs
from planish.network.taps import taps_of
from planish.ptq.passes import Calibration, measure
from planish.ptq.trial import rounded_copy

DEAD = 1e-5  # a channel with a range below this share of its layer's largest is off; scaling would blow up its bias


def by_channels(layer: nn.Module) -> Tensor:
    """A view of the weight as (groups, out, in, rest), where out and in are the channels of one group."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out of one group, ...)
        return weight.detach().view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.detach().view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def output_ranges(layer: nn.Module) -> Tensor:
    """Largest magnitude of the weights of each output channel, (C,)."""
    return by_channels(layer).abs().amax((2, 3)).flatten()


def input_ranges(layer: nn.Module, repeats: int = 1) -> Tensor:
    """Largest magnitude of the weights that read each input channel, (C,), ``repeats`` features to a channel."""
    return by_channels(layer).abs().amax((1, 3)).reshape(-1, repeats).amax(1)


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    """``s_i = sqrt(r1_i r2_i) / r2_i`` (1906.04721, eq. 11) from the ranges of a channel in both layers, (C,) each.

    A channel that is off in one of the layers (see ``DEAD``) gets the scale 1.
    """
    alive = (first > DEAD * first.max()) & (second > DEAD * second.max())
    return torch.where(alive, (first.double() / second.double()).sqrt(), 1.0).to(first.dtype)


def scale_pair(first: nn.Module, second: nn.Module, scales: Tensor, repeats: int = 1) -> None:
    """Divide the output of ``first`` by the scales (C,) and multiply the input of ``second`` by them, in the weights
    (1906.04721, eq. 7)."""
    weight = by_channels(first)
    weight.div_(scales.view(weight.shape[0], weight.shape[1], 1, 1))
    bias = first._parameters.get("bias")
    if bias is not None:
        bias.detach().div_(scales)
    weight = by_channels(second)
    weight.mul_(scales.repeat_interleave(repeats).view(weight.shape[0], 1, weight.shape[2], 1))


@dataclass(frozen=True)
class Equalize:
    """Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721, section 4.1), after ``FoldBatchNorm``.

    Layers with nothing between them but ReLU and other positively homogeneous functions
    (:func:`~planish.network.chains.find_chains`) are scaled channel by channel, pair after pair, until the ranges of
    the weights on both sides are equal. Outputs stay what they are in float: they are compared on the first batch, and
    a pair that changes them is undone. GELU, SiLU and ReLU6 are not homogeneous: pairs around them are left alone (the
    paper replaces ReLU6 by ReLU first, which changes the network).

    Equal ranges of the weights are what one scale for a whole tensor needs. They may cost more than they bring where
    each output channel has a scale of its own: then the first layer of a pair gains nothing, and the ranges of the
    activations between the two can drift apart. So the pass looks whether it helps.

    Attributes:
        rounds: most sweeps over all pairs.
        tolerance: the sweeps end when no scale differs from 1 by more than this, in relative terms.
        guard: undo everything if the network, rounded to nearest, is not closer to the float one on the calibration
            images (mean squared error of the logits) than without equalization.

    Raises:
        PlanishError: an option is out of range, or the network has taps already.
    """

    rounds: int = 100
    tolerance: float = 1e-3
    guard: bool = True
    name = "equalize"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise PlanishError(f"rounds is {self.rounds}: equalization takes at least one sweep over the pairs.")
        if not self.tolerance >= 0:
            raise PlanishError(f"tolerance is {self.tolerance}: give a number of at least 0.")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        model, batch = calibration.model, calibration.batches[0]
        if any(True for _ in taps_of(model)):
            raise PlanishError(
                "equalize changes the ranges of weights and activations, but some of them are set: "
                "put it before Calibrate and Round in the list of passes"
            )
        calibration.float_changes()
        found = find_chains(model, first_image(batch))
        chains = [chain for chain in found if not chain.clipped]
        saved = _Saved(model, chains)
        before = _rounding_error(calibration) if self.guard and chains else math.inf
        kept = self.equalize(model, chains, batch) if chains else []
        text = f"{len(kept)} pairs of layers were equalized"
        if len(kept) < len(chains):
            text += f"; {len(chains) - len(kept)} pairs were left as they were because scaling changed the outputs"
        if len(chains) < len(found):
            text += f"; {len(found) - len(chains)} pairs have a clipping activation such as ReLU6 between them"
        if kept and self.guard and not (after := _rounding_error(calibration)) < before:
            saved.restore()
            text += f"; rounded to nearest the error rose from {before:.3g} to {after:.3g}, so all of it was undone"
        calibration.note(self.name, text)

    def equalize(self, model: nn.Module, chains: Sequence[Chain], batch: Any) -> list[Chain]:
        """Scale the pairs in place; returns those that were kept, all of which leave the outputs on ``batch``."""
        before, saved = outputs(model, batch), _Saved(model, chains)
        self._sweep(model, chains)
        if same_outputs(outputs(model, batch), before):
            return list(chains)
        saved.restore()
        kept = []
        for chain in chains:
            self._sweep(model, [chain])
            if same_outputs(outputs(model, batch), before):
                kept.append(chain)
            saved.restore()
        self._sweep(model, kept)
        if same_outputs(outputs(model, batch), before):
            return kept
        saved.restore()
        return []

    def _sweep(self, model: nn.Module, chains: Sequence[Chain]) -> None:
        for _ in range(self.rounds):
            worst = 0.0
            for chain in chains:
                first, second = model.get_submodule(chain.first), model.get_submodule(chain.second)
                scales = equalizing_scales(output_ranges(first), input_ranges(second, chain.repeats))
                scale_pair(first, second, scales, chain.repeats)
                worst = max(worst, math.expm1(float(scales.log().abs().max())))
            if worst <= self.tolerance:
                return


def _rounding_error(calibration: Calibration) -> float:
    return measure(rounded_copy(calibration)[0])["mse"]


class _Saved:
    """The weights and biases of the pairs before they were scaled."""

    def __init__(self, model: nn.Module, chains: Sequence[Chain]) -> None:
        paths = {path for chain in chains for path in (chain.first, chain.second)}
        parameters = [p for path in paths for p in model.get_submodule(path)._parameters.values() if p is not None]
        self.values = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def restore(self) -> None:
        for parameter, value in self.values:
            parameter.detach().copy_(value)
