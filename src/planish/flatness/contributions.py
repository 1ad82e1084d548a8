"""What the error of each layer adds to the loss of each image, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.flatness.subject import Batch, Subject
from planish.network.batches import call_model, logits_of


class _Projection(nn.Module):
    """Lets an activation pass and, in the backward pass, projects its error on the gradient, image by image."""

    def __init__(self, shape: Sequence[int], quantizer: nn.Module) -> None:
        super().__init__()
        self.shape, self.quantizer = tuple(shape), quantizer
        self.images = 0
        self.total: Tensor | None = None  # (images,)

    def forward(self, x: Tensor) -> Tensor:
        out = x + torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True)
        out.register_hook(partial(self._add, x.detach()))
        return out

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        parts = by_image(gradient * (self.quantizer(x) - x), self.shape, self.images)
        if parts is not None:
            found = parts.sum(1, dtype=torch.float64).cpu()
            self.total = found if self.total is None else self.total + found


def by_image(x: Tensor, shape: Sequence[int], images: int) -> Tensor | None:
    """A batch's tensor as (images, rest), where ``shape`` is what one image gives; None where that cannot be told."""
    if images == 1:
        return x.reshape(1, -1)
    grown = [axis for axis, (many, one) in enumerate(zip(x.shape, shape, strict=False)) if many != one]
    if len(x.shape) != len(shape) or len(grown) != 1 or x.shape[grown[0]] != images * shape[grown[0]]:
        return None
    return x.movedim(grown[0], 0).reshape(images, -1)


def layer_contributions(subject: Subject, grids: Mapping[str, nn.Module], batches: Sequence[Batch]) -> Tensor:
    """First-order change of each image's loss when the activations of each product are rounded, (products, images).

    It is ``sum grad . (Q(x) - x)`` over the inputs of the product that ``grids`` round, with the gradient of the
    cross-entropy of the image in the float network. Products without such an input, or whose tensors do not keep the
    images apart, are left out.
    """
    sites = {s.name: s for s in subject.sites if not s.is_weight and s.name in grids}
    taps = {name: _Projection(site.shape, grids[name]) for name, site in sites.items()}
    parts: list[dict[str, Tensor]] = []
    if not taps:
        return torch.zeros(0, sum(len(labels) for _, labels in batches))
    with subject.tapped(taps), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for x, labels in batches:
            for tap in taps.values():
                tap.images, tap.total = len(labels), None
            F.cross_entropy(logits_of(call_model(subject.model, x)).float(), labels, reduction="sum").backward()
            parts.append({name: tap.total for name, tap in taps.items() if tap.total is not None})
    rows = []
    for product in subject.products:
        names = [s.name for s in product.sites if s.name in taps and all(s.name in part for part in parts)]
        if names:
            rows.append(torch.cat([sum(part[name] for name in names) for part in parts]))  # type: ignore[misc,arg-type]
    return torch.stack(rows) if rows else torch.zeros(0, sum(len(labels) for _, labels in batches))
