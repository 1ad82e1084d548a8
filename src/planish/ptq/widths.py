"""Which widths can be chosen for which layers, what they cost, and how the chosen ones are said in a scheme."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from planish.network import Assignment, Product, Site
from planish.scheme import Format, Scheme

FLOAT_BITS = 32
Bits = Mapping[str, int]  # of the values at a site, by the name of the site


@dataclass(frozen=True)
class Layer:
    """Products that share tensors, and so their widths."""

    products: tuple[Product, ...]
    weights: tuple[Site, ...]  # the quantized ones
    activations: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The name of the first product."""
        return self.products[0].name


@dataclass(frozen=True)
class Widths:
    """One option of a layer: bits of its weights and of its activations; None: as in the plan."""

    weights: int | None
    activations: int | None

    def describe(self) -> str:
        """As in a scheme: "w3a4", "w3", "a4"."""
        return "".join(f"{letter}{n}" for letter, n in (("w", self.weights), ("a", self.activations)) if n is not None)


def find_layers(plan: Assignment, *, activations: bool) -> list[Layer]:
    """The layers whose widths can be chosen, in the order of execution.

    Products that the scheme overrides are not among them, nor those that stay in float, nor (unless the bits of
    activations are chosen) those without a weight.
    """
    groups: list[list[Product]] = []
    for product in plan.products:
        names = {site.name for site in product.sites}
        sharing = [group for group in groups if any(site.name in names for p in group for site in p.sites)]
        groups = [group for group in groups if not any(group is other for other in sharing)]
        groups.append([*(p for group in sharing for p in group), product])
    pinned = {name for name, _ in plan.scheme.overrides} | {product.name for product in plan.allowed}
    order = {product.name: i for i, product in enumerate(plan.products)}
    layers = []
    for group in sorted(groups, key=lambda group: order[group[0].name]):
        sites = {site.name: site for p in group for site in p.sites if plan.formats[site.name] is not None}.values()
        weights = tuple(site for site in sites if site.is_weight)
        others = tuple(site for site in sites if not site.is_weight)
        if not any(p.name in pinned for p in group) and (weights or (activations and others)):
            layers.append(Layer(tuple(group), weights, others))
    return layers


def options_of(layer: Layer, widths: Iterable[int], *, activations: bool) -> list[Widths]:
    """The options of a layer, the narrowest first."""
    bits = sorted(widths)
    of_weights = bits if layer.weights else [None]
    of_activations = bits if activations and layer.activations else [None]
    return [Widths(w, a) for w in of_weights for a in of_activations]


def format_at(scheme: Scheme, site: Site, fmt: Format, bits: int) -> Format:
    """The format that a site gets when its product is overridden with ``bits``; ``fmt`` is its format in the plan."""
    overridden = scheme.at(f"w{bits}").weights if site.is_weight else scheme.at(f"a{bits}").activations
    assert overridden is not None
    return replace(overridden, granularity=fmt.granularity)


def planned_bits(plan: Assignment) -> dict[str, int]:
    """The bits of every site by the plan; what is in float counts as 32."""
    return {name: FLOAT_BITS if fmt is None else fmt.bits for name, fmt in plan.formats.items()}


def chosen_bits(layer: Layer, option: Widths, bits: Bits) -> dict[str, int]:
    """``bits`` with those of the layer's sites as in the option."""
    of_weights = {} if option.weights is None else {site.name: option.weights for site in layer.weights}
    of_activations = {} if option.activations is None else {site.name: option.activations for site in layer.activations}
    return {**bits, **of_weights, **of_activations}


def bit_operations(products: Iterable[Product], bits: Bits) -> int:
    """Multiply-accumulates for one image times the bits of both operands, summed over the products."""
    total = 0
    for product in products:
        widths = sorted((bits[site.name] for site in product.sites), reverse=True) or [FLOAT_BITS]
        total += product.macs * widths[0] * widths[1 if len(widths) > 1 else 0]
    return total


def total_bit_operations(plan: Assignment) -> int:
    """The bit operations of a whole network for one image, products that stay in float included."""
    unreachable = [product for product in plan.allowed if not product.sites]
    return bit_operations([*plan.products, *unreachable], planned_bits(plan))


def weight_bits(sites: Iterable[Site], bits: Bits) -> int:
    """Bits that weights take in a file; one that is computed from a parameter (a part of it, say) takes none itself."""
    return sum(math.prod(site.shape) * bits[site.name] for site in sites if site.parameter)


def all_costs(
    kind: str, model: nn.Module, plan: Assignment, layers: Sequence[Layer], options: Sequence[Sequence[Widths]]
) -> tuple[int, list[list[int]]]:
    """What is spent whatever is chosen, and what each option of each layer costs.

    Args:
        kind: "bops", bit operations for one image, or "bytes": then the costs are in bits, and their sum is the size
            that :func:`planish.network.weights_megabytes` will find.
    """
    bits = planned_bits(plan)
    if kind == "bops":
        chosen = {product.name for layer in layers for product in layer.products}
        rest = [product for product in plan.products if product.name not in chosen]
        rest += [product for product in plan.allowed if not product.sites]
        cost = [
            [bit_operations(x.products, chosen_bits(x, o, bits)) for o in row] for x, row in _pairs(layers, options)
        ]
        return bit_operations(rest, bits), cost
    own = {site.name for layer in layers for site in layer.weights}
    others = [site for site, _ in plan.quantized() if site.is_weight and site.name not in own]
    cost = [[weight_bits(x.weights, chosen_bits(x, o, bits)) for o in row] for x, row in _pairs(layers, options)]
    return float_bits(model, plan) + weight_bits(others, bits), cost


def _pairs(layers: Sequence[Layer], options: Sequence[Sequence[Widths]]) -> list[tuple[Layer, Sequence[Widths]]]:
    return list(zip(layers, options, strict=True))


def float_bits(model: nn.Module, plan: Assignment) -> int:
    """Bits of the parameters that stay in float and of the fp32 scales of all grids."""
    total = 8 * sum(p.numel() * p.element_size() for p in model.parameters())
    for site, fmt in plan.quantized():
        total += 32 * scale_count(site, fmt)
        if site.is_weight and site.parameter:
            weight: Any = model.get_submodule(site.owner)._parameters[site.slot]
            total -= 8 * weight.numel() * weight.element_size()
    return total


def scale_count(site: Site, fmt: Format) -> int:
    """How many scales a grid at a site holds (one by groups holds one for each element)."""
    if fmt.granularity == "group":
        return math.prod(site.shape)
    axis = {"tensor": None, "token": -2, "channel": site.channel_axis or 0}[fmt.granularity]
    return 1 if axis is None else site.shape[axis]


def overrides_for(plan: Assignment, layers: Sequence[Layer], chosen: Sequence[Widths]) -> tuple[tuple[str, str], ...]:
    """The overrides that give the layers the chosen widths, without those that say what the plan says already."""
    before = planned_bits(plan)
    after = before
    for layer, option in zip(layers, chosen, strict=True):
        after = chosen_bits(layer, option, after)
    overrides = []
    for product in (product for layer in layers for product in layer.products):
        if any(after[site.name] != before[site.name] for site in product.sites):
            weight = next((after[site.name] for site in product.sites if site.is_weight), None)
            bits = [after[s.name] for s in product.sites if not s.is_weight and plan.formats[s.name] is not None]
            overrides.append((product.name, Widths(weight, max(bits, default=None)).describe()))
    return tuple(overrides)
