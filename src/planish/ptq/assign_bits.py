"""The pass that gives each layer bits of its own, within a budget of bytes or of bit operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import Site, taps_of
from planish.ptq.budget import Budget, choose, say_cost
from planish.ptq.grids import watch_grids
from planish.ptq.passes import Calibration, Pass
from planish.ptq.rounding import Calibrate, Round
from planish.ptq.sensitivity import every_nth, fisher_losses, measured_losses
from planish.ptq.widths import Layer, Widths, all_costs, find_layers, format_at, options_of, overrides_for
from planish.quantizers import UniformQuantizer
from planish.scheme import MAX_BITS, MIN_BITS

SENSITIVITIES = ("measured", "fisher")
Part = tuple[int, bool, int]  # one width of one part of a layer: its number, whether of the weights, bits


@dataclass(frozen=True)
class AssignBits:
    """Give each layer the width that costs the network least, all of them together within a budget.

    What a width costs is measured or estimated for each layer with everything else in float
    (`planish.ptq.sensitivity`), and an integer program chooses (`planish.ptq.budget`). The first and the last layer are
    chosen like the others; products that the scheme overrides already or that stay in float are left as they are. The
    chosen widths become overrides of the scheme, so that every later pass finds them in the plan.

    It belongs after the passes that change the float network, and its size with it, and before those that set ranges
    and round: `with_bits` puts it there. What later passes add (QwT's compensations) is not in the budget.

    Attributes:
        budget: "0.9MB", "450kB", "900000" (bytes), "0.13x" (of the size in float) or "2.5Gbops".
        sensitivity: "measured" (a pass over the images for each layer and width) or "fisher" (gradients, and rounding
            errors squared).
        activations: choose the bits of activations too, attention included; with a budget of bit operations. False:
            they are as the scheme says.
        widths: the bits to choose from.
        images: calibration images on which the sensitivity is taken.

    Raises:
        PlanishError: an option is none of these; when called: the budget is too small for the narrowest widths.
    """

    budget: str | Budget
    sensitivity: str = "measured"
    activations: bool = False
    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    images: int = 128

    name = "assign-bits"

    def __post_init__(self) -> None:
        kind = Budget.parse(self.budget).kind
        if self.sensitivity not in SENSITIVITIES:
            raise PlanishError(f"sensitivity is {self.sensitivity!r}: choose one of {', '.join(SENSITIVITIES)}")
        if self.activations and kind != "bops":
            raise PlanishError(
                f"the budget {self.budget!r} is a size, which the bits of activations do not change: give bit "
                f"operations, such as 2.5Gbops, or leave activations=False"
            )
        whole = all(type(bits) is int and MIN_BITS <= bits <= MAX_BITS for bits in self.widths)
        if not self.widths or not whole or len(set(self.widths)) < len(self.widths):
            raise PlanishError(f"widths is {self.widths}: give different numbers of bits from {MIN_BITS} to {MAX_BITS}")
        if self.images < 1:
            raise PlanishError(f"images is {self.images}: give at least 1")

    def __call__(self, calibration: Calibration) -> None:
        plan = calibration.assignment
        layers = find_layers(plan, activations=self.activations)
        if not layers:
            calibration.note(self.name, "there is no layer whose bits could be chosen")
            return
        if next(taps_of(calibration.model), None) is not None:
            raise PlanishError(
                f"{self.name} comes after a pass that rounded or set ranges, by bits that it changes: put it before"
            )
        options = [options_of(layer, self.widths, activations=self.activations) for layer in layers]
        kind, limit = limit_of(Budget.parse(self.budget), calibration.given or calibration.model)
        fixed, costs = all_costs(kind, calibration.model, plan, layers, options)
        if fixed + sum(map(min, costs)) > limit:
            raise PlanishError(self._too_little(kind, limit, fixed, fixed + sum(map(min, costs))))
        if fixed + sum(map(max, costs)) <= limit:
            picked, worth = [len(row) - 1 for row in options], "every layer at its widest"
        else:
            losses = self._losses(calibration, layers, options)
            picked = choose(losses, costs, limit - fixed)
            loss = math.fsum(row[i] for row, i in zip(losses, picked, strict=True))
            worth = f"predicted divergence from the float network {loss:.4g} nats"
        chosen = [row[i] for row, i in zip(options, picked, strict=True)]
        overrides = (*plan.scheme.overrides, *overrides_for(plan, layers, chosen))
        calibration.plan_anew(replace(plan.scheme, overrides=overrides))
        spent = _say(fixed + sum(row[i] for row, i in zip(costs, picked, strict=True)), kind)
        alike: dict[str, list[str]] = {}
        for layer, option in sorted(zip(layers, chosen, strict=True), key=lambda pair: pair[1].describe()):
            alike.setdefault(option.describe(), []).append(layer.name)
        bits = "; ".join(f"{option} for {', '.join(names)}" for option, names in alike.items())
        calibration.note(self.name, f"{spent} of {_say(limit, kind)} spent; {worth}; {bits}")

    def _too_little(self, kind: str, limit: int, fixed: int, least: int) -> str:
        budget = Budget.parse(self.budget)
        given = f"{budget.describe()} ({_say(limit, kind)})" if budget.kind == "share" else budget.describe()
        return (
            f"budget {given} is too little: with every layer at {min(self.widths)} bits the network takes "
            f"{_say(least, kind, up=True)}, {_say(fixed, kind)} of it for what has no bits to choose; give as much"
        )

    @torch.no_grad()
    def _losses(
        self, calibration: Calibration, layers: Sequence[Layer], options: Sequence[Sequence[Widths]]
    ) -> list[list[float]]:
        """The loss of each option of each layer: that of its weights and that of its activations."""
        parts: list[Part] = []
        for i, row in enumerate(options):
            parts += [(i, True, bits) for bits in sorted({o.weights for o in row if o.weights is not None})]
            parts += [(i, False, bits) for bits in sorted({o.activations for o in row if o.activations is not None})]
        quantizer = _grids(calibration, layers if self.activations else [])
        trials = [layers[i].weights if of_weights else layers[i].activations for i, of_weights, _ in parts]
        model, products = calibration.model, calibration.assignment.products
        batches = every_nth(calibration.batches, self.images)
        if self.sensitivity == "measured":
            tried = ({s.name: quantizer(s, part[2]) for s in sites} for sites, part in zip(trials, parts, strict=True))
            found = measured_losses(model, products, batches, tried)
        else:
            every: dict[str, dict[int, nn.Module]] = {}
            for sites, (_, _, bits) in zip(trials, parts, strict=True):
                for site in sites:
                    every.setdefault(site.name, {})[bits] = quantizer(site, bits)
            by_site = fisher_losses(model, products, batches, every)
            found = [
                math.fsum(by_site[site.name][part[2]] for site in sites)
                for sites, part in zip(trials, parts, strict=True)
            ]
        loss = _never_growing(dict(zip(parts, found, strict=True)))
        return [
            [loss.get((i, True, o.weights or 0), 0.0) + loss.get((i, False, o.activations or 0), 0.0) for o in row]
            for i, row in enumerate(options)
        ]


def with_bits(passes: Sequence[Pass], bits: Pass) -> list[Pass]:
    """The passes of a method with ``bits`` directly before the first that sets ranges or rounds.

    What comes before that leaves the network in float, but may change its structure, its weights and its size. In a
    list without :class:`Calibrate` and :class:`Round` it comes first.
    """
    first = next((i for i, step in enumerate(passes) if isinstance(step, (Calibrate, Round))), 0)
    return [*passes[:first], bits, *passes[first:]]


def limit_of(budget: Budget, given: nn.Module) -> tuple[str, int]:
    """What a budget is for the network ``given`` in float.

    Returns:
        "bops" and a number of bit operations, or "bytes" and a number of bits (not bytes) of the file.
    """
    if budget.kind == "bops":
        return "bops", math.floor(budget.amount)
    share = sum(p.numel() * p.element_size() for p in given.parameters()) if budget.kind == "share" else 1
    return "bytes", math.floor(8 * budget.amount * share)


def _say(amount: int, kind: str, *, up: bool = False) -> str:
    return say_cost(amount if kind == "bops" else amount / 8, kind, up=up)


def _never_growing(loss: dict[Part, float]) -> dict[Part, float]:
    """More bits cost no more, but for scatter: the least up to each width."""
    return {
        (i, of_weights, bits): min(v for (j, w, b), v in loss.items() if (j, w) == (i, of_weights) and b <= bits)
        for i, of_weights, bits in loss
    }


def _grids(calibration: Calibration, watched: Sequence[Layer]) -> Callable[[Site, int], UniformQuantizer]:
    """A function that makes the quantizer of a weight, or of an activation of the ``watched`` layers, at a width."""
    plan = calibration.assignment
    names = {site.name for layer in watched for site in layer.activations}
    formats = {site.name: fmt for site, fmt in plan.quantized() if site.is_weight or site.name in names}
    fit = watch_grids(calibration.model, plan.products, formats, calibration.batches)

    def quantizer(site: Site, bits: int) -> UniformQuantizer:
        before = plan.formats[site.name]
        assert before is not None
        return fit(site, format_at(plan.scheme, site, before, bits))

    return quantizer
