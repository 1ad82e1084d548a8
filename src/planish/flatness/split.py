"""What rounding costs, taken apart: weights, activations and their interaction, in all and product by product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.flatness.perturbations import chosen, standard_error
from planish.flatness.subject import Batch, Subject
from planish.flatness.taylor import Taylor
from planish.flatness.taylor import taylor as taylor_terms
from planish.network.sites import Site


@dataclass(frozen=True)
class LayerSplit:
    """The increase of the loss when the sites of one product are rounded and everything else is in float, in nats.

    ``interaction`` is 0 where only the weight or only activations are rounded. The Taylor terms are those of
    :class:`LossSplit`, for this product alone.
    """

    product: str
    macs: int
    weights: float
    activations: float
    interaction: float
    both: float
    taylor_weights: float
    taylor_activations: float


@dataclass(frozen=True)
class LossSplit:
    """Increase of the mean cross-entropy in nats, by what is rounded.

    Attributes:
        loss: of the float network.
        weights, activations, both: increase with only the weights, only the activations, or both rounded. Later
            activations are rounded as they then are, with the errors of earlier layers in them.
        interaction: both - weights - activations.
        taylor_weights, taylor_activations: what the second-order formula predicts, g . e + e^T H e / 2 with the exact
            Hessian of the loss on the same labels and all terms between elements and layers; see
            :mod:`planish.flatness.taylor`. The first-order term is kept: it is not 0 for activations, nor for weights
            that are not at a minimum of this loss. NaN where they were not asked for.
        taylor_interaction: the same of ``interaction``: e_w^T H e_a.
        slope_weights, slope_activations: the first-order part of taylor_weights and taylor_activations.
        error: standard error of ``both`` over images (of the paired differences); ``weights_error`` and so on likewise.
            NaN for one image.
        layers: the products in the order of execution.
        images: how many were looked at.
    """

    loss: float
    weights: float
    activations: float
    interaction: float
    both: float
    taylor_weights: float
    taylor_activations: float
    taylor_interaction: float
    slope_weights: float
    slope_activations: float
    error: float
    weights_error: float
    activations_error: float
    interaction_error: float
    layers: list[LayerSplit]
    scheme: str
    images: int


def split_loss(
    subject: Subject,
    scheme: str,
    *,
    images: int | None = None,
    per_layer: bool = True,
    taylor: bool = True,
    draws: int = 4,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> LossSplit:
    """Split the loss that a scheme costs by switching its grids in part by part.

    Cost: four forward passes over the images, up to three more for each product, and what :func:`taylor` says.

    Args:
        images: how many images to look at, taken evenly; default: all.
        per_layer: also for each product alone.
        taylor: also what the second-order formula predicts.
        draws: of the second-order terms of single products, as in :func:`planish.flatness.taylor.taylor`; 0: exact,
            which takes two passes for each product. The terms of the whole network are always exact.
        seed: of these draws.
        progress: called with the share that is done.

    Raises:
        PlanishError: the subject was not prepared for this scheme, or fewer than one image is asked for.
    """
    batches = chosen(subject, images)
    grids = subject.grids(scheme)
    whole = _parts(subject.sites, grids)
    products = [(p, _parts(p.sites, grids)) for p in subject.products] if per_layer else []
    products = [(product, parts) for product, parts in products if parts["both"]]
    tell = progress or (lambda share: None)
    clean = subject.losses(batches).double()
    increases = _measured(subject, whole, batches, clean)
    terms = taylor_terms(subject, whole, batches) if taylor else {}
    single: dict[tuple[str, str], Taylor] = {}
    if taylor and products:
        sets = {(p.name, part): parts[part] for p, parts in products for part in ("weights", "activations")}
        single = taylor_terms(subject, {k: v for k, v in sets.items() if v}, batches, draws=draws, seed=seed)
    layers = []
    for i, (product, parts) in enumerate(products):
        tell(i / len(products))
        means = {part: float(d.mean()) for part, d in _measured(subject, parts, batches, clean).items()}
        predicted = [single.get((product.name, part), Taylor()).total for part in ("weights", "activations")]
        if not taylor:
            predicted = [math.nan, math.nan]
        layers.append(LayerSplit(product.name, product.macs, **means, taylor_weights=predicted[0],
                                 taylor_activations=predicted[1]))  # fmt: skip
    tell(1.0)
    return _total(clean, increases, terms, layers, scheme)


def _parts(sites: Sequence[Site], grids: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """The quantizers of weights, of activations and of both among some sites."""
    both = {site.name: grids[site.name] for site in sites if site.name in grids}
    weights = {site.name for site in sites if site.is_weight}
    return {
        "weights": {name: tap for name, tap in both.items() if name in weights},
        "activations": {name: tap for name, tap in both.items() if name not in weights},
        "both": both,
    }


def _measured(
    subject: Subject, parts: Mapping[str, Mapping[str, nn.Module]], batches: Sequence[Batch], clean: Tensor
) -> dict[str, Tensor]:
    """Increase of each image's loss with each part rounded, and what is left over for the interaction, (images,) each.

    Nothing is computed twice: an empty part costs nothing, and ``both`` is then the other one.
    """
    found: dict[str, Tensor] = {}
    for part in ("weights", "activations"):
        found[part] = torch.zeros_like(clean)
        if parts[part]:
            with subject.tapped(parts[part]):
                found[part] = subject.losses(batches).double() - clean
    alone = found["weights"] + found["activations"]
    found["both"] = alone
    if parts["weights"] and parts["activations"]:
        with subject.tapped(parts["both"]):
            found["both"] = subject.losses(batches).double() - clean
    found["interaction"] = found["both"] - alone
    return found


def _total(
    clean: Tensor,
    increases: Mapping[str, Tensor],
    terms: Mapping[str, Taylor],
    layers: list[LayerSplit],
    scheme: str,
) -> LossSplit:
    n = len(clean)
    mean = {part: float(d.mean()) for part, d in increases.items()}
    error = {part: standard_error(d) for part, d in increases.items()}
    unknown = Taylor(math.nan, math.nan)
    weights, activations, both = (terms.get(part, unknown) for part in ("weights", "activations", "both"))
    return LossSplit(
        loss=float(clean.mean()), **mean, taylor_weights=weights.total, taylor_activations=activations.total,
        taylor_interaction=both.second - weights.second - activations.second,
        slope_weights=weights.first, slope_activations=activations.first,
        error=error["both"], weights_error=error["weights"], activations_error=error["activations"],
        interaction_error=error["interaction"], layers=layers, scheme=scheme, images=n,
    )  # fmt: skip
