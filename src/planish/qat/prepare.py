"""Put trainable quantizers into a network, and take what they have learned out again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid
from planish.network import Assignment, Site, attach, taps_of
from planish.network.batches import call_model
from planish.network.modes import evaluating
from planish.ptq.passes import Calibration
from planish.ptq.rounding import Calibrate, Round
from planish.qat.method import Method
from planish.quantizers import (
    DoReFaQuantizer,
    FixedQuantizer,
    LaterQuantizer,
    LearnedQuantizer,
    PACTQuantizer,
    ShiftedLearnedQuantizer,
    ShiftedQuantizer,
    StatsQuantizer,
    TrainableQuantizer,
    UniformQuantizer,
)
from planish.scheme import Format

Make = Callable[[Format, Site, Method], TrainableQuantizer]


def _learned(fmt: Format, site: Site, method: Method, **options: Any) -> TrainableQuantizer:
    return LearnedQuantizer(
        fmt, channel_axis=site.channel_axis or 0, init=method.init, per_image=not site.is_weight, pull=method.pull,
        **options,
    )  # fmt: skip


WEIGHTS: dict[str, Make] = {
    "lsq": _learned,
    "dorefa": lambda fmt, site, method: DoReFaQuantizer(fmt),
    "statsq": lambda fmt, site, method: StatsQuantizer(fmt, channel_axis=site.channel_axis or 0),
    "fixed": lambda fmt, site, method: FixedQuantizer(fmt, channel_axis=site.channel_axis or 0),
    "later": lambda fmt, site, method: LaterQuantizer(fmt, channel_axis=site.channel_axis or 0),
}
ACTIVATIONS: dict[str, Make] = {
    "lsq": _learned,
    "lsq+": lambda fmt, site, method: _learned(fmt, site, method, learn_zero_point=True),
    "pact": lambda fmt, site, method: PACTQuantizer(fmt),
    "shifted": lambda fmt, site, method: ShiftedLearnedQuantizer(
        fmt, init=method.init, per_image=True, pull=method.pull, feature_axis=_feature_axis(site)
    ),
    "fixed": lambda fmt, site, method: FixedQuantizer(fmt, channel_axis=site.channel_axis or 0),
}


def _feature_axis(site: Site) -> int:
    """Where an activation has its features, counted from the end: an image has them second, a key last but one."""
    if site.slot.endswith("_key"):
        return -2
    return 1 - len(site.shape) if site.role == "input" and len(site.shape) == 4 and site.slot == "input" else -1


def make_quantizer(site: Site, fmt: Format, method: Method, plan: Assignment) -> TrainableQuantizer:
    """The quantizer that ``method`` uses at a site."""
    if not site.is_weight:
        return _pick(ACTIVATIONS, "activations", method.activations)(fmt, site, method)
    kind = method.weights
    if fmt.bits != plan.scheme.weights.bits:
        kind = kind if kind in ("fixed", "later") else "lsq"  # the first and last layer, at 8 bits
    return _pick(WEIGHTS, "weights", kind)(fmt, site, method)


def _pick(table: dict[str, Make], what: str, kind: str) -> Make:
    if kind not in table:
        raise PlanishError(f"the quantizer of the {what} is {kind!r}: choose one of {', '.join(table)}")
    return table[kind]


class _Start(nn.Module):
    """Initializes a quantizer from the first tensor that passes, which goes on unrounded."""

    def __init__(self, site: Site, quantizer: TrainableQuantizer, grid: Grid) -> None:
        super().__init__()
        self.site, self.quantizer, self.grid, self.done = site, quantizer, grid, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            self.done = True
            try:
                self.quantizer.initialize(x.detach(), self.grid)
            except PlanishError as error:
                raise PlanishError(f"{self.site.name}: {error}") from None
        return x


@torch.no_grad()
def insert_quantizers(
    model: nn.Module, batches: Sequence[Any], plan: Assignment, method: Method
) -> dict[str, TrainableQuantizer]:
    """Put the method's quantizers at every site that ``plan`` quantizes, in place, and give them by name of site.

    A network that is quantized keeps its grids, and its shifts of activations if it has any; any other is calibrated on
    ``batches`` (inputs only).

    Raises:
        PlanishError: the network has shifts, which the quantizers of the method have not.
    """
    with evaluating(model):
        grids = {name: tap.grid for name, tap in taps_of(model) if isinstance(tap, UniformQuantizer)}
        shifted = {name: tap for name, tap in taps_of(model) if isinstance(tap, ShiftedQuantizer)}
        if not grids:
            calibration = Calibration(model, list(batches), plan, [])
            Calibrate()(calibration)
            Round()(calibration)
            grids = {name: tap.grid for name, tap in taps_of(model) if isinstance(tap, UniformQuantizer)}
        sites = {site.name: site for site, _ in plan.quantized()}
        made = {site.name: make_quantizer(site, fmt, method, plan) for site, fmt in plan.quantized()}
        starts = {name: _Start(sites[name], tap, grids[name]) for name, tap in made.items()}
        attach(model, plan.products, lambda site: starts.get(site.name))
        call_model(model, batches[0])
    for name, old in shifted.items():
        _take_shifts(name, made[name], old, method)
    attach(model, plan.products, lambda site: made.get(site.name))
    device = next(model.parameters()).device
    for tap in made.values():
        tap.to(device)
    model.train(model.training)
    return made


def _take_shifts(name: str, made: TrainableQuantizer, tap: ShiftedQuantizer, method: Method) -> None:
    if not isinstance(made, ShiftedLearnedQuantizer):
        raise PlanishError(
            f"{name}: the start has learned shifts around the rounding of activations, which {method.name} has no "
            "place for: train it by ofq, or start from the network in float"
        )
    made.before.data, made.after.data = tap.before.flatten().clone(), tap.after.flatten().clone()


@torch.no_grad()
def bake_quantizers(model: nn.Module, plan: Assignment, example: Any) -> None:
    """Replace trained quantizers by plain ones on the grids that they have come to, in place.

    What comes out computes what the trained network computes in evaluation mode, bit for bit (but for weights that are
    rounded only now), and is what :func:`planish.quantize` gives back: it is evaluated, listed by the ledger and saved
    in the same way.
    """
    model.eval()
    call_model(model, example)  # scales that are statistics of the weights are of the weights as they are now
    taps = {name: tap for name, tap in taps_of(model) if isinstance(tap, TrainableQuantizer)}
    sites = {site.name: site for site, _ in plan.quantized()}
    baked = {name: tap.baked() for name, tap in taps.items()}
    attach(model, plan.products, lambda site: baked.get(site.name))
    for name, tap in taps.items():
        site = sites[name]
        if site.parameter:
            parameter = model.get_submodule(site.owner)._parameters[site.slot]
            assert parameter is not None
            parameter.copy_(tap.latent(parameter))
    model.eval().requires_grad_(False)
    model.planish_assignment = plan  # type: ignore[assignment]
