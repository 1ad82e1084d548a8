"""What one tensor on a grid costs the network: measured in the logits, or estimated from the curvature of the loss.

Both are a Kullback-Leibler divergence between the classes that the float network predicts and those that it predicts
with this one tensor rounded, in nats, averaged over the images; both leave everything else in float. Where the outputs
are labels or features, it is their distance (:mod:`planish.task`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planish.network import Product, attach, detach
from planish.network.batches import call_model, cut, logits_of, map_tensors, size_of
from planish.ptq.passes import run_logits
from planish.task import task_of

Quantizers = Mapping[str, nn.Module]  # by the name of the site


def every_nth(batches: Sequence[Any], images: int) -> list[Any]:
    """At most ``images`` images of the batches, taken evenly from all of them."""
    step = -(-sum(size_of(batch) for batch in batches) // images)
    taken, start = [], 0
    for batch in batches:
        size = size_of(batch)
        if start < size:
            taken.append(map_tensors(batch, lambda tensor, start=start: tensor[start::step]))  # type: ignore[misc]
        start = (start - size) % step
    return taken


class Switch(nn.Module):
    """A tap that lets its tensor pass until a quantizer is put in."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer: nn.Module | None = None

    @property
    def idle(self) -> bool:
        """Whether the tensor passes unchanged."""
        return self.quantizer is None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.quantizer is None else self.quantizer(x)


@torch.no_grad()
def measured_losses(
    model: nn.Module, products: Sequence[Product], batches: Sequence[Any], trials: Iterable[Quantizers]
) -> list[float]:
    """The mean divergence from the float network with the quantizers of each trial in place, and no others.

    This is the sensitivity of ZeroQ (Cai et al. 2020, arXiv:2001.00281, equation 4) with the float network's own
    classes. One pass over the batches for each trial. The model has no taps, before and after.
    """
    reference = torch.cat(run_logits(model, batches))
    task = task_of(model, reference)
    switches: dict[str, Any] = attach(model, products, lambda site: Switch())
    losses = []
    try:
        for trial in trials:
            for name, quantizer in trial.items():
                switches[name].quantizer = quantizer
            losses.append(task.exact(reference, torch.cat(run_logits(model, batches))).mean().item())
            for name in trial:
                switches[name].quantizer = None
    finally:
        detach(model)
    return losses


class _WeightProbe(nn.Module):
    """Sums the squares of the gradient of each batch with respect to the weight that passes."""

    def __init__(self, quantizers: Mapping[Any, nn.Module]) -> None:
        super().__init__()
        self.quantizers = dict(quantizers)
        self.shift: Tensor | None = None
        self.weight = self.squares = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.shift is None:
            self.weight, self.squares = x.detach(), torch.zeros_like(x)
            self.shift = torch.zeros_like(x).requires_grad_()
        return x + self.shift

    def take(self) -> None:
        assert self.shift is not None
        if self.shift.grad is not None:
            self.squares += self.shift.grad.square()
            self.shift.grad = None

    def total(self, key: Any) -> float:
        error = self.quantizers[key](self.weight) - self.weight
        return float((self.squares.double() * error.double().square()).sum())


class _ActivationProbe(nn.Module):
    """Sums the squares of gradient times rounding error over the elements of an activation, for each width."""

    def __init__(self, quantizers: Mapping[Any, nn.Module]) -> None:
        super().__init__()
        self.quantizers = dict(quantizers)
        self.sums = dict.fromkeys(self.quantizers, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        out = x + torch.zeros((), device=x.device, dtype=x.dtype, requires_grad=True)
        if out.requires_grad:
            out.register_hook(partial(self._add, x.detach()))
        return out

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        for key, quantizer in self.quantizers.items():
            error = quantizer(x) - x
            self.sums[key] += float((gradient.double() * error.double()).square().sum())

    def take(self) -> None:
        pass

    def total(self, key: Any) -> float:
        return self.sums[key]


@contextmanager
def _probing(
    model: nn.Module, products: Sequence[Product], quantizers: Mapping[str, Mapping[Any, nn.Module]]
) -> Iterator[dict[str, Any]]:
    weights = {site.name for product in products for site in product.sites if site.is_weight}
    probes: dict[str, Any] = {
        name: (_WeightProbe if name in weights else _ActivationProbe)(tried) for name, tried in quantizers.items()
    }
    try:
        yield attach(model, products, lambda site: probes.get(site.name))
    finally:
        detach(model)


def fisher_losses(
    model: nn.Module,
    products: Sequence[Product],
    batches: Sequence[Any],
    quantizers: Mapping[str, Mapping[Any, nn.Module]],
    *,
    draws: int = 4,
    images: int = 8,
    seed: int = 0,
) -> dict[str, dict[Any, float]]:
    """Half the sum over the elements of a tensor of diag(F) times its squared rounding error, by site and quantizer.

    F is the Fisher information of the float network for an image, the Hessian of the divergence at its minimum. Its
    diagonal is the expected square of the gradient of -log p(y) for labels y drawn from the network's own prediction.
    Such gradients of different images are independent with mean 0, so the square of their sum over a batch estimates
    the sum of the squares.

    Args:
        quantizers: by the name of the site and a key of the caller's, such as the width.
        draws: labels drawn for each image.
        images: images whose gradients are summed before they are squared; fewer: less scatter, more time.

    Returns:
        Nats for one image, by site and key. The model has no taps, before and after.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with _probing(model, products, quantizers) as probes, torch.enable_grad():
        for batch in batches:
            for start in range(0, size_of(batch), images):
                part = cut(batch, start, start + images)
                for _ in range(draws):
                    outputs = logits_of(call_model(model, part)).float()
                    task_of(model, outputs).draw(outputs, generator).backward()  # type: ignore[no-untyped-call]
                    for probe in probes.values():
                        probe.take()
                    count += len(outputs)
        with torch.no_grad():
            return {name: {key: p.total(key) / (2 * count) for key in p.quantizers} for name, p in probes.items()}
