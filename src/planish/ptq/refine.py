"""Ranges of activations by what they do to the output of the module that multiplies, not to the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, taps_of
from planish.network.batches import call_model, copied, first_images
from planish.network.units import first_tensor
from planish.ptq.outputs import keep_float
from planish.ptq.passes import Calibration
from planish.quantizers import UniformQuantizer

FACTORS = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)


@dataclass(frozen=True)
class RefineRanges:
    """Scale the range of each activation by the factor that leaves the least error in its module's output.

    The least squared error of a tensor is not that of the product it enters. The probabilities of attention show it
    most: nearly all of them are small, and a step that rounds these to zero costs little in squared error and most of
    the sum. So each range is multiplied by some factors, with everything else in float, and the output of the module
    that multiplies (a layer, or a whole attention with its projection) is compared with the float one, in the manner of
    PTQ4ViT (Yuan et al. 2022, arXiv 2111.12293, section 3.2), without its gradients. The ranges of heads
    (``ScaleHeads``) are scaled one after another. After ``Calibrate``.

    Attributes:
        images: calibration images that are looked at.
        factors: what ranges are multiplied by; the range as it is always is among them.

    Raises:
        PlanishError: an option is out of range, or no range has been set before.
    """

    images: int = 32
    factors: tuple[float, ...] = FACTORS
    name = "refine-ranges"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise PlanishError(f"images is {self.images}: ranges are refined on at least 1")
        if not self.factors or min(self.factors) <= 0:
            raise PlanishError(f"factors is {self.factors}: give positive numbers")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        teacher, model = keep_float(calibration), calibration.model
        taps = {name: tap for name, tap in taps_of(model) if isinstance(tap, UniformQuantizer) and tap.fitted}
        by_module: dict[str, list[Site]] = {}
        for product in calibration.assignment.products:
            sites = [site for site in product.sites if not site.is_weight and site.name in taps]
            by_module.setdefault(product.module, []).extend(sites)
        if not any(by_module.values()):
            raise PlanishError("refine-ranges finds no range of an activation: put it after Calibrate in the list")
        calls = _first_calls(teacher, calibration.batches, [path for path in by_module if path], self.images)
        changed = 0
        for path, sites in by_module.items():
            if path in calls:
                changed += self._refine(model.get_submodule(path), calls[path], [taps[site.name] for site in sites])
        calibration.note(self.name, f"{changed} of {sum(map(len, by_module.values()))} ranges were changed")

    def _refine(self, module: nn.Module, call: _Call, own: list[UniformQuantizer]) -> int:
        """Set the ranges of the module's own taps, one after another; returns how many changed."""
        inside = {tap for tap in module.modules() if isinstance(tap, UniformQuantizer)}
        changed = 0
        for tap in dict.fromkeys(own):
            given = tap.grid
            with _silent(inside - {tap}):
                for entry in range(given.scale.numel()):  # several: one for each head
                    self._refine_entry(module, call, tap, entry)
            changed += int(not torch.equal(tap.grid.scale, given.scale))
        return changed

    def _refine_entry(self, module: nn.Module, call: _Call, tap: UniformQuantizer, entry: int) -> None:
        given, best, least = tap.grid, tap.grid, float("inf")
        for factor in dict.fromkeys((1.0, *self.factors)):
            scale = given.scale.clone()
            scale.view(-1)[entry] *= factor
            tap.grid = given._replace(scale=scale)
            error = call.error(module)
            if error < least:
                best, least = tap.grid, error
        tap.grid = best


class _Call:
    """How a module was called in the float network, and what it gave."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output

    def error(self, module: nn.Module) -> float:
        """The squared error of the module's output now."""
        args, kwargs = copied((self.args, self.kwargs))  # the module may work in place on them
        found = first_tensor(module(*args, **kwargs))
        assert found is not None
        return float((found - self.output).square().sum())


def _first_calls(model: nn.Module, batches: list[Any], paths: list[str], images: int) -> dict[str, _Call]:
    """The first call of each module for some images, where it gives a tensor.

    All is copied as it is at that time: what follows may work in place on it.
    """
    entered: dict[str, tuple[Any, Any]] = {}
    found: dict[str, _Call] = {}
    handles = []
    for path in paths:

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            if path not in entered:
                entered[path] = copied((args, kwargs))

        def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            tensor = first_tensor(output)
            if path not in found and tensor is not None:
                found[path] = _Call(*entered[path], tensor.clone())

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        call_model(model, first_images(batches, images))
    finally:
        for handle in handles:
            handle.remove()
    return found


class _silent:
    """Quantizers that let tensors pass unrounded."""

    def __init__(self, taps: set[UniformQuantizer]) -> None:
        self.taps = taps

    def __enter__(self) -> None:
        for tap in self.taps:
            tap.__dict__["forward"] = lambda x: x

    def __exit__(self, *_: object) -> None:
        for tap in self.taps:
            tap.__dict__.pop("forward", None)
