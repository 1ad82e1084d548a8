"""The second-order Taylor formula of the loss along quantization errors, with the Hessian itself.

``L(a + e) = L(a) + g . e + e^T H e / 2`` is what noise training reasons with (arXiv 2511.01462; for weights already
LeCun et al. 1990, "Optimal brain damage"). Every set of sites gets one scalar t, in ``x + t e`` at each of its sites
with the error e = Q(x) - x held at its value in the float network. Then dL/dt is ``g . e`` and d2L/dt2 is ``e^T H e``,
with the Hessian itself: all terms between the elements of the set, and no Gauss-Newton or Fisher matrix in its
place. Weights and activations are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.flatness.correlations import random_signs
from planish.flatness.subject import Batch, Subject
from planish.network.batches import call_model, cut, logits_of

AT_ONCE = 16  # images whose graph of the second derivative is held at once
Sets = Mapping[Any, Mapping[str, nn.Module]]  # by any key: quantizers by the name of their site


@dataclass(frozen=True)
class Taylor:
    """The terms of one set of sites, in nats for one image; the second-order one is e^T H e / 2."""

    first: float = 0.0
    second: float = 0.0

    @property
    def total(self) -> float:
        return self.first + self.second


class _Along(nn.Module):
    """x + (sum of the t of all sets that the site is in) e, with e = Q(x) - x held fixed; every t is 0."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.amounts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            error = self.quantizer(x.detach()) - x.detach()
        return x + torch.stack(self.amounts).sum().to(x.dtype) * error


def taylor(
    subject: Subject, sets: Sets, batches: Sequence[Batch], *, draws: int = 0, seed: int = 0
) -> dict[Any, Taylor]:
    """First- and second-order terms of the mean cross-entropy for each set of sites.

    A ReLU has no second derivative here, though values near its kink do cross it when they are rounded.

    Args:
        sets: the quantizers whose errors are taken together, by a key of the caller's; sets may overlap.
        draws: 0: every second-order term exactly, with one more backward pass through the graph for each set. Else: so
            many passes for all sets at once, along a random sign for each set and every few images; the estimate is
            unbiased (Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix") and blurred by the
            terms between sets, e_i^T H e_j, over the root of the number of signs. The first-order terms are exact.
        seed: of the signs.
    """
    if not sets:
        return {}
    taps = {name: _Along(quantizer) for one in sets.values() for name, quantizer in one.items()}
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.zeros(len(sets), dtype=torch.float64) for _ in range(2))
    count = 0
    with subject.tapped(taps), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for x, labels in split(batches, AT_ONCE):
            amounts = [torch.zeros((), device=labels.device, requires_grad=True) for _ in sets]
            for name, tap in taps.items():
                tap.amounts = [t for t, one in zip(amounts, sets.values(), strict=True) if name in one]
            loss = F.cross_entropy(logits_of(call_model(subject.model, x)).float(), labels, reduction="sum")
            slopes = gradients(loss, amounts, create_graph=True)
            first += torch.stack([slope.detach() for slope in slopes]).double().cpu()
            second += _sampled(slopes, amounts, draws, generator) if draws else _exact(slopes, amounts)
            count += len(labels)
    return {
        key: Taylor(float(slope) / count, float(curvature) / (2 * count))
        for key, slope, curvature in zip(sets, first, second, strict=True)
    }


def _exact(slopes: Sequence[Tensor], amounts: Sequence[Tensor]) -> Tensor:
    """The diagonal of the Hessian with respect to the amounts, (sets,)."""
    rows = [gradients(slope, [t], retain_graph=True)[0] for slope, t in zip(slopes, amounts, strict=True)]
    return torch.stack(rows).double().cpu()


def _sampled(slopes: Sequence[Tensor], amounts: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
    """An unbiased estimate of it: the mean of s * (H s) over random signs s."""
    total = torch.zeros(len(amounts), dtype=torch.float64)
    for _ in range(draws):
        signs = random_signs(len(amounts), generator=generator)
        along = (torch.stack(list(slopes)) * signs.to(slopes[0])).sum()
        total += signs * torch.stack(list(gradients(along, amounts, retain_graph=True))).double().cpu()
    return total / draws


def gradients(output: Tensor, inputs: Sequence[Tensor], **options: Any) -> Sequence[Tensor]:
    """Gradients with zeros where ``output`` does not depend on an input."""
    if not inputs or not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return torch.autograd.grad(output, list(inputs), materialize_grads=True, **options)


def split(batches: Sequence[Batch], images: int) -> list[Batch]:
    """The same images in batches of at most so many."""
    return [cut(batch, start, start + images) for batch in batches for start in range(0, len(batch[1]), images)]
