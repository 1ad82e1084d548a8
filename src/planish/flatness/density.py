"""The spectral density of a Hessian: how many eigenvalues lie where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Density:
    """A density on a grid of eigenvalues; the integral over ``x`` is 1."""

    x: list[float]
    y: list[float]


def broadened(
    values: Sequence[Tensor], weights: Sequence[Tensor], *, points: int = 512, width: float = 0.01
) -> Density:
    """The mean over runs of weighted eigenvalues, each of them a Gaussian.

    Stochastic Lanczos quadrature: Ritz values of a run from a random direction, with the squared first components
    of their eigenvectors, are a quadrature of it (Golub & Welsch 1969; Ghorbani et al. 2019,
    arXiv 1901.10159, algorithm 2). With all eigenvalues and equal weights it is the density itself.

    Args:
        values, weights: for each run, (m,); the weights of a run sum to 1.
        points: of the grid, which reaches five standard deviations beyond the outermost values.
        width: standard deviation of the Gaussians, as a share of the range of all values.
    """
    every = torch.cat(list(values))
    low, high = every.min().item(), every.max().item()
    # a spectrum of one value has no range: then the scale is the value itself, and 1 if that is 0
    sigma = width * (high - low or abs(high) or 1.0)
    x = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
    y = torch.zeros(points, dtype=torch.float64)
    for nodes, shares in zip(values, weights, strict=True):
        bells = torch.exp(-0.5 * ((x[:, None] - nodes.double()) / sigma).square())
        y += bells @ shares.double() / len(values)
    return Density(x.tolist(), (y / torch.trapezoid(y, x)).tolist())
