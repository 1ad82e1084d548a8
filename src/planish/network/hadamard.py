"""Orthogonal matrices that spread every coordinate over all others: Hadamard matrices with random signs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from planish.errors import PlanishError


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix, (n, n) of +1 and -1 in float64, with ``H @ H.T == n * I``.

    Sylvester's doubling of 1 for powers of two (the order of ``scipy.linalg.hadamard``), and of Paley's first
    construction for the rest: the factor is the smallest ``m = n / 2^k`` whose ``m - 1`` is a prime of the form
    ``4 i + 3``. So 192, 384 and 768 are of order 12 doubled, 1280 is 20 doubled, 1152 is 72 doubled.

    Raises:
        PlanishError: neither construction gives this size (see :func:`has_hadamard`).
    """
    factor = _factor(n)
    if factor is None:
        raise PlanishError(
            f"there is no Hadamard matrix of size {n} here: give a power of two, or one times 12, 20, 24, 44, ..."
        )
    matrix, double = _paley(factor), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range((n // factor).bit_length() - 1):
        matrix = torch.kron(double, matrix)
    return matrix


def has_hadamard(n: int) -> bool:
    """Whether :func:`hadamard` has a matrix of this size."""
    return _factor(n) is not None


def random_rotation(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, (n, n) in float64, determined by the state of the generator (on the CPU).

    ``H D / sqrt(n)`` with random signs D (the randomized Hadamard transform) where there is a Hadamard matrix; else a
    dense matrix drawn uniformly from all orthogonal ones (Q of a Gaussian matrix, Mezzadri 2007, arXiv
    math-ph/0609050, section 5).
    """
    if has_hadamard(n):
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
        return hadamard(n) * signs.double() / math.sqrt(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _factor(n: int) -> int | None:
    """The smallest order from which doubling leads to n: 1, or that of a Paley matrix."""
    if n < 1:
        return None
    found, m = None, n
    while True:
        if m == 1 or ((m - 1) % 4 == 3 and _is_prime(m - 1)):
            found = m
        if m % 2:
            return found
        m //= 2


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, math.isqrt(n) + 1))


def _paley(n: int) -> Tensor:
    """Paley's first construction (1933) for a prime ``q = n - 1 = 4 i + 3``: I + S, S skew and made of residues.

    ``n = 1`` is the matrix [1].
    """
    q = n - 1
    if q == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    character = -torch.ones(q, dtype=torch.float64)
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    i = torch.arange(q)
    skew = torch.zeros(n, n, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(i[None, :] - i[:, None]) % q]
    return skew + torch.eye(n, dtype=torch.float64)
