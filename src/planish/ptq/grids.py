"""Grids of any width for the sites of one float network, whose activations are watched once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import Product, Site, detach
from planish.ptq.passes import watch_sites
from planish.ptq.rounding import Watcher, catch, named_quantizer
from planish.quantizers import UniformQuantizer
from planish.scheme import Format


@torch.no_grad()
def watch_grids(
    model: nn.Module, products: Sequence[Product], formats: Mapping[str, Format], batches: Sequence[Any]
) -> Callable[[Site, Format], UniformQuantizer]:
    """Watch the network in float on ``batches`` and return a function that fits a quantizer to a site.

    Args:
        model: the float network, in evaluation mode; taps are removed from it.
        formats: by the name of the site, a format of every weight and activation that will be asked for. The one asked
            for later may differ from it in its width; granularity, symmetry and observer must be the same.

    Returns:
        A function of a site and a format. It raises :class:`PlanishError` where the site's values give no grid.
    """
    detach(model)
    sites = {site.name: site for product in products for site in product.sites if site.name in formats}
    derived = catch(model, products, [n for n, s in sites.items() if s.is_weight and not s.parameter], batches[0])
    detach(model)
    watched = {name for name, site in sites.items() if not site.is_weight}
    watchers: dict[str, nn.Module] = {}
    if watched:
        watchers = watch_sites(
            model, products, batches, lambda s: Watcher(s, formats[s.name]) if s.name in watched else None
        )

    def fit(site: Site, fmt: Format) -> UniformQuantizer:
        if not site.is_weight:
            watchers[site.name].format = fmt  # type: ignore[assignment]  # what it saw does not depend on the bits
            return named_quantizer(site, fmt, watchers[site.name])
        weight = model.get_submodule(site.owner)._parameters[site.slot] if site.parameter else derived[site.name]
        assert weight is not None
        try:
            return UniformQuantizer(fmt, channel_axis=site.channel_axis or 0).fit(weight)
        except PlanishError as error:
            raise PlanishError(f"{site.name}: {error}") from None

    return fit
