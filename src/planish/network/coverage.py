"""Which site gets which format: a scheme laid over the products of a model, with nothing left out silently."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from planish.errors import PlanishError
from planish.network.sites import Product, Site, Watched
from planish.network.taps import CHILD
from planish.scheme import Format, Scheme, read_override


@dataclass(frozen=True)
class Assignment:
    """A scheme applied to a model: the format of every site, ``None`` where it stays in float."""

    scheme: Scheme
    products: tuple[Product, ...]
    formats: Mapping[str, Format | None]
    allowed: tuple[Product, ...] = ()  # products left in float because the caller said so

    def quantized(self) -> Iterator[tuple[Site, Format]]:
        """Every site that gets a grid, once, in the order of execution."""
        seen = set()
        for product in self.products:
            for site in product.sites:
                fmt = self.formats[site.name]
                if fmt is not None and site.name not in seen:
                    seen.add(site.name)
                    yield site, fmt

    def only(self, names: Collection[str]) -> Assignment:
        """The same with the sites of these names alone; all others stay in float."""
        formats = {name: fmt if name in names else None for name, fmt in self.formats.items()}
        return replace(self, formats=formats)


def read_through_its_tap(model: nn.Module, site: Site, plan: Assignment) -> bool:
    """Whether nobody reads the bare weight: an embedding that shares it with the classifier does."""
    weight = model.get_submodule(site.owner)._parameters[site.slot]
    users = {product.module for product in plan.products if site in product.sites}
    holders = {
        path
        for path, module in model.named_modules()
        if CHILD not in path.split(".") and any(p is weight for p in module._parameters.values())
    }
    return holders - {site.owner} <= users


def _matches(product: Product, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns for name in (product.module, product.name))


def check_patterns(watched: Watched, patterns: Iterable[str]) -> None:
    """Raise :class:`PlanishError` on the first pattern that matches no product."""
    everything = [*watched.products, *watched.unreachable]
    for pattern in patterns:
        if not any(_matches(product, (pattern,)) for product in everything):
            raise PlanishError(
                f"allow={pattern!r} matches no matrix product of this model; "
                f"its products are {', '.join(p.name for p in everything[:4])}, ..."
            )


def check_covered(watched: Watched, allow: Iterable[str] = ()) -> tuple[Product, ...]:
    """The unreachable products that ``allow`` names; raises :class:`PlanishError` on the first one that it does not."""
    for product in watched.unreachable:
        if not _matches(product, allow):
            where = product.module or "the model itself"
            raise PlanishError(
                f"{where}: {product.operator} multiplies matrices where no tap can reach it, so it would stay in "
                f"float; write allow=({(product.module or product.name)!r},) to accept that"
            )
    return tuple(watched.unreachable)


def _weight_format(site: Site, weights: Format) -> Format:
    """A vector, or a weight without an axis of output channels, gets one scale, lest each element get its own."""
    if weights.granularity == "channel" and site.channel_axis is None:
        return replace(weights, granularity="tensor")
    return weights


def _activation_format(product: Product, site: Site, scheme: Scheme, batch: int) -> Format | None:
    """One scale, or a scale for each token or head.

    Tokens are in dimension -2 where nothing else is: it holds the rows of an image in a convolution's input, the batch
    in a pooled feature and in a sequence-first layer (PyTorch's multi-head attention is one), and features in a key,
    which its product takes transposed. A dimension as long as the batch is taken for the batch. A key that the model
    transposes itself, for a plain ``matmul``, cannot be told from a value: its rows get scales of their own. Heads are
    those of a softmax output, where the scheme asks for it.
    """
    activations = scheme.activations
    if activations is None:
        return None
    if scheme.heads and activations.granularity == "tensor" and not site.is_weight and site.channel_axis is not None:
        return replace(activations, granularity="channel")
    if activations.granularity != "token":
        return activations
    rows = len(site.shape) > 2 and site.shape[-2] != batch
    tokens = rows and not product.operator.startswith("conv") and not site.slot.endswith("_key")
    return activations if tokens else replace(activations, granularity="tensor")


def _check_overrides(watched: Watched, overrides: Mapping[str, str], allow: Iterable[str]) -> None:
    """Raise :class:`PlanishError` on the first override that cannot be followed."""
    products = {product.name: product for product in watched.products}
    said: dict[str, tuple[str, int | None]] = {}  # by site: the product that spoke, and its bits
    for name, notation in overrides.items():
        if name not in products:
            raise PlanishError(
                f"override {notation!r} of {name!r} names no matrix product of this model; "
                f"its products are {', '.join([*products][:4])}, ..."
            )
        product = products[name]
        if _matches(product, allow):
            raise PlanishError(
                f"{name} is overridden with {notation!r} and left in float by allow: drop one of the two"
            )
        weight_bits, activation_bits = read_override(notation, name)
        if (weight_bits is None) != (product.weight is None):
            fitting = f"a{activation_bits or 4}" if product.weight is None else f"w{weight_bits or 4}{notation}"
            has = "has no weight" if product.weight is None else "has a weight"
            raise PlanishError(f"override {notation!r} of {name} does not fit: the product {has}, so write {fitting}")
        for site in product.sites:
            bits = weight_bits if site.is_weight else activation_bits
            other, before = said.setdefault(site.name, (name, bits))
            if before != bits:
                raise PlanishError(
                    f"overrides of {other} and {name} give the tensor {site.name}, which they share, "
                    f"{before or 'float'} and {bits or 'float'} bits: give both the same"
                )


def assign(watched: Watched, scheme: Scheme | str, *, allow: Iterable[str] = ()) -> Assignment:
    """Give every site of a watched model its format.

    The first and the last product that have a weight get ``scheme.edge_bits`` for weight and input, and the products
    in ``scheme.overrides`` what is said there.

    Args:
        allow: shell patterns of modules or products (``"blocks.0.attn"``, ``"head*"``) that may stay in float.

    Raises:
        PlanishError: a product can be reached by no tap and ``allow`` does not name it, a pattern matches nothing, or
            an override names no product, one that ``allow`` leaves in float, or widths that do not fit the product.
    """
    scheme = Scheme.parse(scheme)
    patterns = (allow,) if isinstance(allow, str) else tuple(allow)
    check_patterns(watched, patterns)
    unreachable = check_covered(watched, patterns)
    weighted = [product for product in watched.products if product.weight is not None]
    edges = {product.name for product in (weighted[:1] + weighted[-1:])}
    overrides = dict(scheme.overrides)
    _check_overrides(watched, overrides, patterns)
    formats: dict[str, Format | None] = {}
    allowed = [*unreachable]
    # overridden products come last, so that theirs is the format of a site that they share with another product
    for product in sorted(watched.products, key=lambda product: product.name in overrides):
        if _matches(product, patterns):
            allowed.append(product)
            formats.update({site.name: None for site in product.sites if site.name not in formats})
            continue
        if product.name in overrides:
            chosen = scheme.at(overrides[product.name])
        else:
            chosen = scheme.edge() if product.name in edges else scheme
        for site in product.sites:
            if site.is_weight:
                formats[site.name] = _weight_format(site, chosen.weights)
            else:
                formats[site.name] = _activation_format(product, site, chosen, watched.batch)
    return Assignment(scheme, tuple(watched.products), formats, tuple(allowed))
