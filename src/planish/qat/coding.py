"""Minimal coding length: how many nats a set of vectors takes, as a measure of the entropy of a representation.

``m`` vectors of length 1 in ``d`` dimensions, coded up to a mean squared error of ``eps2``, take
``(m + d)/2 logdet(I + d/(m eps2) Z^T Z)`` (Ma et al. 2007; maximised by MEC, Liu et al. 2022, arXiv 2210.11464). It is
smallest if all vectors are equal and largest if they spread evenly over all directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planish.errors import PlanishError

LARGEST = 0.9  # norm up to which a series without a shift is summed; at 1 it diverges


def unit_rows(x: Tensor) -> Tensor:
    """The rows of ``x`` (m, d) in float32 or better, divided by their norms; rows of zeros stay zero."""
    x = x if x.dtype == torch.float64 else x.float()
    peak = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(peak == 0, torch.ones_like(peak), peak)  # so that squares neither vanish nor overflow
    # now the norm is 0, where its derivative is taken as 0, or at least 1
    return x / x.norm(dim=-1, keepdim=True).clamp(min=0.5)


def log_determinant(z: Tensor, eps2: float, *, other: Tensor | None = None, order: int | None = None) -> Tensor:
    """``logdet(I + C)``, ``C = d/(m eps2) P^T Z`` with ``P = Z``, or with another view of the same m things as ``P``.

    The smaller of the two products is taken, (d, d) or (m, m): both have the same nonzero eigenvalues.

    Args:
        z: (m, d), rows of norm at most 1. ``other`` has the same shape and receives gradients, too, if it needs them.
        order: None for the determinant itself (by Cholesky, or by LU for two views, where it is the logarithm of its
            absolute value), or an even number of terms of the Taylor series (:func:`series`).

    Raises:
        PlanishError: ``order`` is odd, where the last term would reward equal vectors; ``eps2`` is not positive.
    """
    check(eps2, order)
    m, d = z.shape
    p = z if other is None else other
    c = (p.mT @ z if d <= m else p @ z.mT) * (d / (m * eps2))
    if order is not None:
        return series(c, order, shifted=other is None)
    c = c + torch.eye(len(c), dtype=c.dtype, device=c.device)
    if other is not None:
        return torch.linalg.slogdet(c).logabsdet
    return 2 * torch.linalg.cholesky(c).diagonal().log().sum()


def check(eps2: float, order: int | None) -> None:
    """Raise :class:`PlanishError` for a distortion or an order of the series that means nothing."""
    if not eps2 > 0:
        raise PlanishError(f"the coding length has a distortion eps2 of {eps2}: it is positive")
    if order is not None and (order < 2 or order % 2):
        raise PlanishError(f"the series of the coding length has order {order}: give an even number, or None for exact")


def series(c: Tensor, order: int, *, shifted: bool = True) -> Tensor:
    """The first ``order`` terms of the Taylor series of ``logdet(I + C)``; it converges for every C.

    Shifted (for a C without negative eigenvalues): around ``(1 + s) I``, with ``s`` half a bound of the largest one,
    ``logdet(I + C) = n log(1 + s) + sum_k (-1)^(k+1) tr(D^k) / k``, ``D = (C - s I) / (1 + s)``, whose norm is below 1.

    Not shifted, as MEC has it: around I. A C whose norm exceeds 0.9 is scaled down to it and the sum scaled back, which
    is what MEC's larger distortion in the first epochs does.
    """
    bound = norm_bound(c.detach())
    n = len(c)
    identity = torch.eye(n, dtype=c.dtype, device=c.device)
    if shifted:
        shift = bound / 2
        start, c, back = n * torch.log1p(shift), (c - shift * identity) / (1 + shift), torch.ones_like(bound)
    else:
        back = (bound / LARGEST).clamp(min=1)
        start, c = torch.zeros_like(bound), c / back
    total, power = torch.zeros_like(bound), identity
    for k in range(1, order + 1):
        power = power @ c
        total = total + (-1) ** (k + 1) * power.diagonal().sum() / k
    return start + back * total


def norm_bound(c: Tensor) -> Tensor:
    """An upper bound of the absolute values of all eigenvalues, ``|C^4|^(1/4)`` in the Frobenius norm.

    At most n^(1/8) times too large for a symmetric C, and the same in any basis.
    """
    norm = c.norm()
    unit = c / norm.clamp(min=torch.finfo(c.dtype).tiny)
    square = unit @ unit
    return norm * (square @ square).norm() ** 0.25


def largest(m: int, d: int, eps2: float) -> float:
    """The largest ``logdet(I + C)`` of m unit vectors: reached if all nonzero eigenvalues of ``Z^T Z`` are equal.

    For two views it bounds the logarithm of the determinant's absolute value.
    """
    rank = min(m, d)
    return rank * math.log1p(d / (rank * eps2))


def magnitude_groups(magnitudes: Tensor, experts: int) -> list[Tensor]:
    """Indices of (m,) magnitudes in ``experts`` groups of (nearly) equal size, the smallest magnitudes first.

    At most one group for each two members is made: one vector alone has a constant coding length.
    """
    if experts < 1:
        raise PlanishError(f"the coding length has {experts} experts: give at least one")
    order = magnitudes.detach().argsort(stable=True)
    return list(order.tensor_split(max(1, min(experts, len(order) // 2))))


def coding_length(
    z: Tensor, eps2: float, *, other: Tensor | None = None, groups: list[Tensor] | None = None, order: int | None = None
) -> Tensor:
    """``R = sum_k (n_k + d)/2 logdet(I + d/(n_k eps2) Z_k^T Z_k)`` in nats, group k holding ``n_k`` rows of ``z``.

    Without ``groups`` it is the coding length of all rows. With them, vectors of each group are coded by an expert of
    their own, so that the few large ones of a long tail are not lost among the many (the mixture of experts of
    MEC-Quant, arXiv 2509.15514, in the manner of the rate of segmented data of MCR^2, arXiv 2006.08558).

    Args:
        z: (m, d), rows of norm at most 1; ``other``: a second view of the same m things, (m, d).
        groups: indices of rows, from :func:`magnitude_groups`.
        order: see :func:`log_determinant`.
    """
    whole = [slice(None)] if groups is None else groups
    parts = []
    for group in whole:
        mine = z[group]
        factor = sum(mine.shape) / 2
        view = None if other is None else other[group]
        parts.append(factor * log_determinant(mine, eps2, other=view, order=order))
    return torch.stack(parts).sum()


def coding_share(
    z: Tensor, eps2: float, *, other: Tensor | None = None, groups: list[Tensor] | None = None, order: int | None = None
) -> Tensor:
    """:func:`coding_length` over the largest that as many unit vectors can have: at most 1 (exact, or converged).

    So that a weight of it in an objective means the same whatever m, d, the distortion and the number of groups.
    """
    m, d = z.shape
    sizes = [m] if groups is None else [len(group) for group in groups]
    most = sum((n + d) / 2 * largest(n, d, eps2) for n in sizes)
    return coding_length(z, eps2, other=other, groups=groups, order=order) / most
