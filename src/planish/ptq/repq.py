"""RepQ-ViT's treatment of LayerNorm: a scale for each channel when the range is set, one scale when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.network import Site
from planish.network.norm_readers import find_norm_readers
from planish.ptq.exactness import exact_ones, few_images, require_float
from planish.ptq.passes import Calibration, watch_sites
from planish.quantizers import RunningRange
from planish.quantizers.ranges import fit_rows, grid_of_range
from planish.scheme import Format

LEAST = 1e-2  # smallest scale of a channel, relative to the mean over channels: one that is constant has none


class Ranges(NamedTuple):
    """A grid for each channel: x is near ``(q - zero) * scale`` for a code q. (C,) each; the zeros are real numbers."""

    scale: Tensor
    zero: Tensor


class Fold(NamedTuple):
    """The norm's output x becomes ``(x + shift) / factor``, (C,) each."""

    factor: Tensor
    shift: Tensor


@dataclass(frozen=True)
class RepQ:
    """Give the inputs of the linear layers after a LayerNorm one range that fits all channels (RepQ-ViT, Li et al.
    2023, arXiv 2212.08254, section 3.3).

    The outputs of LayerNorm differ much from channel to channel. The pass sets a range for each channel by the
    scheme's observer, then moves the differences of scale and zero point into the affine map of the norm, and their
    inverse into the weights of the layers that read it, so that the one range that calibration finds afterwards fits
    every channel. The outputs in float stay what they were. It runs before ``Calibrate``, on norms whose output only
    linear layers read; the paper's other half, logarithmic grids for the softmax, is not in it.

    Raises:
        PlanishError: the network has taps already.
    """

    name = "repq"

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        model, images = calibration.model, few_images(calibration.batches[0])
        formats = input_formats(calibration)
        pairs = {}
        for norm, linears in find_norm_readers(model, images):
            quantized = [path for path in linears if path in formats]
            if quantized:
                pairs[norm] = (linears, formats[quantized[0]])
        if not pairs:
            self._note(calibration, "no LayerNorm is read by linear layers with quantized inputs only")
            return
        ranges = channel_ranges(calibration, [site for _, (site, _) in pairs.values()])
        folds = {norm: (linears, one_range(ranges[site.name], fmt)) for norm, (linears, (site, fmt)) in pairs.items()}
        folds, left_out = exact_ones(model, folds, _fold_all, images, "folding the ranges into")
        for text in left_out:
            self._note(calibration, text)
        _fold_all(model, folds)

    def _note(self, calibration: Calibration, text: str) -> None:
        calibration.note(self.name, text)


def one_range(ranges: Ranges, fmt: Format) -> Fold:
    """Equations 8 to 12 of the paper: from a scale and a zero point for each channel to one of each.

    With s and z of the channels, their means s~ and z~, ``r1 = s / s~`` and ``r2 = z - z~``, the new input is
    ``x' = (x + s * r2) / r1``: its codes ``round(x' / s~) + z~`` are those of x on the grid of its channel. A symmetric
    format has z~ = 0. Scales below a hundredth of the mean are raised to it.
    """
    scale = ranges.scale.clamp(min=LEAST * float(ranges.scale.mean()))
    zero = ranges.zero * ranges.scale / scale
    common = 0.0 if fmt.symmetric else zero.mean().round().clamp(fmt.qmin, fmt.qmax)
    return Fold(scale / scale.mean(), scale * (zero - common))


def channel_ranges(calibration: Calibration, sites: Sequence[Site]) -> dict[str, Ranges]:
    """A range for each channel (the last dimension) of the tensors at some sites, over all batches, by site."""
    plan = calibration.assignment
    formats = {site.name: replace(fmt, granularity="channel") for site in sites if (fmt := plan.formats[site.name])}

    def watcher(site: Site) -> nn.Module | None:
        return RunningRange(formats[site.name], channel_axis=-1) if site.name in formats else None

    watchers: dict[str, Any] = watch_sites(calibration.model, plan.products, calibration.batches, watcher)
    return {name: _ranges(watcher) for name, watcher in watchers.items()}


def _ranges(watched: RunningRange) -> Ranges:
    """The grid of each channel around its own centre, so that it need not contain 0."""
    if watched.format.observer == "minmax":
        centre = (watched.low + watched.high) / 2
        scale, zero = grid_of_range(watched.low - centre, watched.high - centre, watched.format)
    else:
        centre = watched.sample.mean(1)
        values = watched.sample - centre[:, None]
        scale, zero = fit_rows(values, watched.least - centre, watched.most - centre, watched.format)
    return Ranges(scale.double(), zero.double() - centre.double() / scale.double())


def input_formats(calibration: Calibration) -> dict[str, tuple[Site, Format]]:
    """By path of a linear layer: the site of its input and the format there, if it has one."""
    found = {}
    for product in calibration.assignment.products:
        for site in product.sites:
            fmt = calibration.assignment.formats[site.name]
            if product.operator == "linear" and product.weight and site.role == "input" and fmt is not None:
                found[product.weight.owner] = site, fmt
    return found


def _fold_all(model: nn.Module, folds: dict[str, tuple[list[str], Fold]]) -> None:
    for norm, (linears, fold) in folds.items():
        fold_into(model.get_submodule(norm), [model.get_submodule(path) for path in linears], fold)


@torch.no_grad()
def fold_into(norm: Any, linears: Sequence[Any], fold: Fold) -> None:
    """Put ``(x + shift) / factor`` into the affine map of the norm and take it back in the layers that read x."""
    factor, shift = (t.to(norm.weight.device, torch.float64) for t in fold)
    _set_bias(norm, ((0 if norm.bias is None else norm.bias.double()) + shift) / factor)
    norm.weight.copy_(norm.weight.double() / factor)
    for linear in linears:
        weight = linear.weight.double()
        _set_bias(linear, (0 if linear.bias is None else linear.bias.double()) - weight @ shift)
        linear.weight.copy_(weight * factor)


def _set_bias(layer: Any, value: Tensor) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(value.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(value)
