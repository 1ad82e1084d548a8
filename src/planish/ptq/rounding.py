"""The three passes of plain calibrated rounding (``rtn``): fold, calibrate, round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import Product, Site, attach, fold_batchnorm
from planish.network.batches import call_model
from planish.network.taps import taps_of
from planish.ptq.passes import Calibration, watch_sites
from planish.quantizers import RunningRange, UniformQuantizer
from planish.scheme import Format


class FoldBatchNorm:
    """Fold BatchNorm into the layer before it (Jacob et al. 2018, arXiv 1712.05877, section 3.2)."""

    name = "fold-batchnorm"

    def __call__(self, calibration: Calibration) -> None:
        fold_batchnorm(calibration.model, calibration.batches[0])
        calibration.float_changes()


class Calibrate:
    """Set the range of every activation grid from the calibration images, by the scheme's observer.

    The network runs in float while its activations are watched, so the ranges are those of the float network.
    """

    name = "calibrate"

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        model, plan = calibration.model, calibration.assignment
        formats = {site.name: fmt for site, fmt in plan.quantized() if not site.is_weight}

        weights = {name: tap for name, tap in taps_of(model) if name not in formats}  # if they were rounded before

        def watcher(site: Site) -> nn.Module | None:
            return Watcher(site, formats[site.name]) if site.name in formats else None

        watchers = watch_sites(model, plan.products, calibration.batches, watcher)

        def quantizer(site: Site) -> nn.Module | None:
            if site.name not in formats:
                return weights.get(site.name)
            return named_quantizer(site, formats[site.name], watchers[site.name])

        attach(model, plan.products, quantizer)


class Watcher(RunningRange):
    """A running range whose errors say at which site they occurred."""

    def __init__(self, site: Site, fmt: Format) -> None:
        super().__init__(fmt, channel_axis=site.channel_axis or 0)
        self.site = site

    def observe(self, x: torch.Tensor) -> None:
        try:
            super().observe(x)
        except PlanishError as error:
            raise PlanishError(f"{self.site.name}: {error}") from None


def named_quantizer(site: Site, fmt: Format, watcher: nn.Module) -> UniformQuantizer:
    assert isinstance(watcher, RunningRange)
    tap = UniformQuantizer(fmt, channel_axis=site.channel_axis or 0)
    try:
        tap.grid = watcher.grid()
    except PlanishError as error:
        raise PlanishError(f"{site.name}: {error}") from None
    return tap


class Round:
    """Round every weight to the nearest point of its grid, whose range the scheme's observer sets."""

    name = "round"

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        model, plan = calibration.model, calibration.assignment
        formats = {site.name: fmt for site, fmt in plan.quantized()}
        present = dict(taps_of(model))
        derived = _derived_weights(calibration)

        def tap(site: Site) -> nn.Module | None:
            fmt = formats.get(site.name)
            if fmt is None or not site.is_weight:
                return present.get(site.name)
            owner: Any = model.get_submodule(site.owner)
            weight = owner._parameters[site.slot] if site.parameter else derived[site.name]
            try:
                return UniformQuantizer(fmt, channel_axis=site.channel_axis or 0).fit(weight)
            except PlanishError as error:
                raise PlanishError(f"{site.name}: {error}") from None

        attach(model, plan.products, tap)


class _Catch(nn.Module):
    """Keeps the tensor that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value = x.detach().clone()
        return x


def _derived_weights(calibration: Calibration) -> dict[str, torch.Tensor]:
    """The weights that are computed from parameters on the way (standardized convolutions, slices of a projection)."""
    model, plan = calibration.model, calibration.assignment
    wanted = {site.name for site, _ in plan.quantized() if site.is_weight and not site.parameter}
    return catch(model, plan.products, wanted, calibration.batches[0])


def catch(
    model: nn.Module, products: Sequence[Product], wanted: Collection[str], inputs: Any
) -> dict[str, torch.Tensor]:
    """What passes the sites of these names for one batch of inputs; the other taps stay where they are."""
    if not wanted:
        return {}
    present = dict(taps_of(model))
    catches = {name: _Catch() for name in wanted}
    attach(model, products, lambda site: catches.get(site.name) or present.get(site.name))
    call_model(model, inputs)
    attach(model, products, lambda site: present.get(site.name))
    return {name: one.value for name, one in catches.items()}
