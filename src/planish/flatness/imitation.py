"""Rounding imitated by a gain and independent noise: what the noise model says a quantizer will do to a network.

The best linear description of ``Q(x)`` by ``x`` is ``Q(x) = gain * x + rest`` with a rest that is uncorrelated with x
(Bussgang 1952). With many bits the gain is 1 and the rest has the variance ``s^2 / 12``; with few bits small values are
rounded to zero and large ones cut off, the gain leaves 1, and noise alone no longer says what happens. Here the rest is
replaced by Gaussian noise of its mean and variance, drawn independently for every element: if a network under the
imitation loses what the rounded one loses, then the noise model holds, and its loss could be known without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.flatness.perturbations import standard_error
from planish.flatness.subject import Batch, Subject
from planish.network import Product, Site
from planish.task import CLASSES


@dataclass(frozen=True)
class Decomposition:
    """``Q(x) = gain * x + rest``: the gain, and mean and variance of the rest where x is not zero. They broadcast."""

    gain: Tensor
    mean: Tensor
    variance: Tensor


def decompose(x: Tensor, rounded: Tensor, dims: Sequence[int] | None = None) -> Decomposition:
    """The best linear description of ``rounded`` by ``x``, with one gain for all elements along ``dims`` (None: all).

    An exact zero stays a zero on every grid, so mean and variance are those of the values that are not zero. A tensor
    of zeros has gain 1 and no rest.
    """
    x, rounded = x.double(), rounded.double()
    over = list(range(x.dim()) if dims is None else dims)

    def total(values: Tensor) -> Tensor:
        return values.sum(over, keepdim=True) if over else values

    power, present = total(x * x), (x != 0).double()
    gain = torch.where(power > 0, total(rounded * x) / power.clamp(min=1e-300), torch.ones_like(power))
    rest = rounded - gain * x
    count = total(present).clamp(min=1)
    mean = total(rest * present) / count
    variance = total((rest - mean).square() * present) / count
    return Decomposition(gain, mean, variance)


def shared_dims(product: Product, site: Site, dims: int) -> list[int]:
    """The dimensions of a tensor of ``dims`` dimensions over which the moments of its error are taken.

    A weight has moments of its own in each output channel, an activation in each feature: a feature that is nearly
    constant is rounded in the same direction in every image, and one gain for a whole layer does not show that.
    """
    if site.is_weight:
        return [d for d in range(dims) if site.channel_axis is None or d != site.channel_axis % dims]
    if product.operator.startswith("conv"):  # (images, channels, ...)
        return [0, *range(2, dims)]
    tokens = [] if dims < 3 else [dims - 1 if site.slot.endswith("_key") else dims - 2]  # a key comes transposed
    return [0, *tokens]


class Imitator(nn.Module):
    """A tap that passes ``gain * x + mean + deviation * noise`` in place of the quantizer's output.

    A weight is drawn once and kept, as a rounded weight is; an activation anew in each pass.
    """

    def __init__(self, quantizer: nn.Module, product: Product, site: Site, seed: int) -> None:
        super().__init__()
        self.quantizer, self.product, self.site = quantizer, product, site
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept
        parts = decompose(x, self.quantizer(x), shared_dims(self.product, self.site, x.dim()))
        noise = torch.randn(x.shape, generator=self.generator).to(x.device)  # drawn on the CPU: the same on any device
        rest = parts.mean.to(x.dtype) + parts.variance.sqrt().to(x.dtype) * noise
        out = parts.gain.to(x.dtype) * x + rest * (x != 0)
        if self.site.is_weight:
            self.kept = out
        return out


def imitators(subject: Subject, quantizers: Mapping[str, nn.Module], seed: int = 0) -> dict[str, nn.Module]:
    """An :class:`Imitator` for each quantizer, by the name of its site."""
    owners = {site.name: (product, site) for product in reversed(subject.products) for site in product.sites}
    numbers = {site.name: number for number, site in enumerate(subject.sites)}
    return {
        name: Imitator(quantizer, *owners[name], seed=1_000_003 * (seed + 1) + numbers[name])
        for name, quantizer in quantizers.items()
    }


@dataclass(frozen=True)
class Imitation:
    """What a network is worth under the imitation, averaged over draws; ``error``: of the loss, over the draws.

    ``divergence`` is KL(float || imitated) in nats for an image, ``loss`` the cross-entropy, ``top1`` the share right.
    """

    scheme: str
    divergence: float
    loss: float
    top1: float
    error: float


def imitate(
    subject: Subject,
    scheme: str,
    *,
    draws: int = 2,
    seed: int = 0,
    batches: list[Batch] | None = None,
    reference: Tensor | None = None,
) -> Imitation:
    """Run the network under the imitated rounding of ``scheme`` and say what it is worth on ``batches``.

    Args:
        draws: of noise.
        reference: the float network's logits on ``batches``, where the caller has them.
    """
    batches = batches or subject.batches
    labels = torch.cat([y for _, y in batches]).cpu()
    reference = subject.logits(batches) if reference is None else reference
    found = []
    for draw in range(draws):
        with subject.tapped(imitators(subject, subject.quantizers[scheme], seed * draws + draw)):
            logits = subject.logits(batches)
        top1 = (logits.argmax(-1) == labels).double().mean()
        loss = F.cross_entropy(logits.double(), labels)
        found.append(torch.stack([CLASSES.exact(reference, logits).mean(), loss, top1]))
    divergence, loss, top1 = torch.stack(found).mean(0).tolist()
    return Imitation(scheme, divergence, loss, top1, standard_error(torch.stack(found)[:, 1]))
