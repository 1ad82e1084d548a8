"""The trace of a Hessian, whole and by layer, from products with random signs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.flatness.hessian import Hessian
from planish.flatness.lanczos import Krylov
from planish.flatness.perturbations import standard_error


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error: 0 where it is exact, NaN where a single probe says nothing of it."""

    value: float
    error: float

    @classmethod
    def exact(cls, samples: Tensor) -> Estimate:
        """Of the one sample that is the value itself, (1,)."""
        return cls(samples.item(), 0.0)

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """The mean of independent samples, (k,)."""
        return cls(samples.mean().item(), standard_error(samples))


def trace_samples(hessian: Hessian, probes: int, *, generator: torch.Generator, krylov: Krylov | None = None) -> Tensor:
    """Independent unbiased estimates of the trace of each parameter's own block; (probes, parameters), float64.

    Hutchinson (1990): for a vector v of random signs, the mean of ``v_l . (H v)_l`` is the trace of block l, since the
    signs of different weights are independent. The sum over the parameters estimates the trace of H.

    With ``krylov`` (from a run that is independent of the probes), the part of H that the run knows, ``V T V^T``, goes
    in exactly, and the probes estimate the rest. This is the idea of Hutch++ (Meyer et al. 2021, arXiv 2010.09649) with
    a subspace that was computed anyway; the scatter is that of the rest alone.
    """
    inner, diagonal = None, torch.zeros(len(hessian.parameters), dtype=torch.float64)
    if krylov is not None:
        inner = krylov.matrix.to(krylov.basis)
        diagonal = torch.stack(
            [((inner @ rows) * rows).sum(dtype=torch.float64) for rows in hessian.blocks(krylov.basis)]
        )
    found = []
    for block in _blocks(probes, hessian.block):
        signs = torch.stack([random_signs(hessian, generator) for _ in range(block)])
        products = hessian.multiply(signs)
        if krylov is not None and inner is not None:
            products = products - (signs @ krylov.basis.T) @ inner @ krylov.basis
        found.append(hessian.layer_sums(products.mul_(signs)) + diagonal.cpu())
    return torch.cat(found)


def random_signs(hessian: Hessian, generator: torch.Generator) -> Tensor:
    """-1 or 1, each with probability 1/2, (size,); drawn on the CPU, so that they are the same everywhere."""
    drawn = torch.randint(0, 2, (hessian.size,), generator=generator, dtype=torch.int8)
    return drawn.to(hessian.device, hessian.dtype).mul_(2).sub_(1)


def _blocks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)
