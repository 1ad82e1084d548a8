"""Eigenvalues of an operator from its products with vectors: Lanczos' method with full reorthogonalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.flatness.hessian import Hessian

TOLERANCE = 1e-4  # relative residual at which an eigenvalue counts as found


@dataclass(frozen=True)
class Krylov:
    """What a run of Lanczos' method knows of an operator H: ``H V = V T + coupling * v e_m^T``, v orthogonal to V.

    Attributes:
        basis: the rows of V^T, orthonormal, (m, size).
        matrix: T = V^T H V, symmetric and tridiagonal, (m, m), float64, on the CPU.
        coupling: the norm of what the last product has outside of the basis; 0 when the subspace is invariant.
    """

    basis: Tensor
    matrix: Tensor
    coupling: float

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values from the largest, their residuals ``|H u - value u|``, and their weights for a quadrature.

        A residual bounds the distance to the nearest eigenvalue (Parlett, The Symmetric Eigenvalue Problem, 1998). The
        weights are the squared first components of T's eigenvectors (Golub & Welsch 1969); they sum to 1.
        """
        values, vectors = torch.linalg.eigh(self.matrix)
        residuals = self.coupling * vectors[-1].abs()
        return values.flip(0), residuals.flip(0), vectors[0].square().flip(0)


def random_start(hessian: Hessian, generator: torch.Generator) -> Tensor:
    """A direction that is uniform on the sphere, of length 1; drawn on the CPU, so that it is the same everywhere."""
    drawn = torch.randn(hessian.size, generator=generator, dtype=torch.float64)
    return (drawn / drawn.norm()).to(hessian.device, hessian.dtype)


def lanczos(
    hessian: Hessian, steps: int, *, generator: torch.Generator, wanted: int = 0, tolerance: float = TOLERANCE
) -> Krylov:
    """Run Lanczos' method from a random direction.

    When the subspace is invariant before ``wanted`` values are known, the run goes on from a new random direction, so
    that an operator of low rank, and the zero operator, have as many eigenvalues as any other.

    Args:
        steps: at most so many products; the basis takes ``steps * size`` numbers.
        wanted: stop as soon as so many of the largest eigenvalues are found; 0: do all steps, or stop when the
            subspace is invariant.
        tolerance: an eigenvalue is found when its residual is at most this share of it (or rounding noise).

    Note:
        Of an eigenvalue that is there several times, a single direction shows one.
    """
    steps = min(steps, hessian.size)
    epsilon = torch.finfo(hessian.dtype).eps
    basis = torch.empty(steps, hessian.size, dtype=hessian.dtype, device=hessian.device)
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    basis[0] = random_start(hessian, generator)
    for k in range(steps):
        product = hessian.multiply(basis[k : k + 1])[0]
        matrix[k, k] = _dot(product, basis[k])
        rest = _orthogonal(product, basis[: k + 1])
        coupling = _dot(rest, rest) ** 0.5
        noise = 10 * epsilon * float(matrix[: k + 1, : k + 1].abs().max())
        if coupling <= noise:
            coupling = 0.0
        found = Krylov(basis[: k + 1], matrix[: k + 1, : k + 1], coupling)
        if k + 1 == steps or _done(found, wanted, tolerance, noise):
            return found
        if coupling == 0:
            rest = _orthogonal(random_start(hessian, generator), basis[: k + 1])
        basis[k + 1] = rest / _dot(rest, rest) ** 0.5
        matrix[k, k + 1] = matrix[k + 1, k] = coupling
    raise AssertionError("a run has at least one step")


def _done(found: Krylov, wanted: int, tolerance: float, noise: float) -> bool:
    if not wanted:
        return found.coupling == 0
    values, residuals, _ = found.ritz()
    if len(values) < wanted:
        return False
    return bool((residuals[:wanted] <= tolerance * values[:wanted].abs() + noise).all())


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector outside of the span of orthonormal rows; the second round takes the first one's rounding."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector
