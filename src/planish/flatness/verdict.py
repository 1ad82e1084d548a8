"""Which law a quantization error follows: distances to the Gaussian and to the uniform law, and a plain verdict.

With a million values every test of normality rejects, so nothing here is a p-value. The Kolmogorov distance, the
largest gap between two distribution functions, is an effect size: it lies in [0, 1] and does not grow with the sample.
The uniform law on one step and the Gaussian of the same variance are 0.057 apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Law = Callable[[Tensor], Tensor]  # a distribution function, elementwise in float64

BINS = 40
COVERED = 0.995  # share of the errors that the bins of a histogram hold before the two end bins take the rest

# Thresholds of the verdict.
CROWDED = 0.9  # this share of the values on one code: the grid does not resolve the tensor
CLIPPED = 0.5  # this share of the squared error made by clipped values
CLOSE = 0.05  # Kolmogorov distance at which a law still describes the error; less than what separates the two laws
SCATTER = 1.36  # over the root of the sample: the distance that 95 % of samples of the law itself stay below
STILL = 1e-4  # a standard deviation of fewer steps than this is no spread (the noise of float32 at 8 bits is 1e-5)


@dataclass(frozen=True)
class Histogram:
    """Densities of the error in steps (they integrate to 1), and of the two laws over the same bins.

    The first and the last bin also hold what lies beyond them. With nothing to count every density is 0.
    """

    edges: list[float]
    density: list[float]
    gaussian: list[float]
    uniform: list[float]


def gaussian_law(mean: float, variance: float) -> Law:
    """Distribution function of N(mean, variance)."""
    return lambda u: torch.special.ndtr((u - mean) / math.sqrt(variance))


def uniform_law(u: Tensor) -> Tensor:
    """Distribution function of the uniform law on [-1/2, 1/2]."""
    return (u + 0.5).clamp(0, 1)


def kolmogorov_distance(sample: Tensor, law: Law) -> float:
    """Largest gap between the empirical distribution function of ``sample`` (n,) and ``law``; NaN for n = 0."""
    n = sample.numel()
    if n == 0:
        return math.nan
    ordered = law(sample.double().sort().values)
    rank = torch.arange(n + 1, dtype=torch.float64, device=sample.device) / n
    return float(torch.maximum((rank[1:] - ordered).max(), (ordered - rank[:-1]).max()))


def histogram(sample: Tensor, gaussian: Law | None) -> Histogram:
    """Histogram of errors in steps, (n,), over a range of one step times a power of two on either side of 0."""
    sample = sample.double().cpu()
    reach = 1.0  # a Gaussian of the uniform law's variance has nothing to speak of beyond
    if sample.numel():
        needed = float(sample.abs().quantile(COVERED))
        while reach < needed:
            reach *= 2
    edges = torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64)
    width = 2 * reach / BINS
    bins = ((sample + reach) / width).floor().clamp(0, BINS - 1).long()
    density = torch.bincount(bins, minlength=BINS) / (max(1, sample.numel()) * width)
    return Histogram(edges.tolist(), density.tolist(), _binned(edges, gaussian), _binned(edges, uniform_law))


def _binned(edges: Tensor, law: Law | None) -> list[float]:
    """Mean density of a law in each bin; the end bins hold its tails."""
    if law is None:
        return [0.0] * (len(edges) - 1)
    below = law(edges)
    below[0], below[-1] = 0.0, 1.0
    return (below.diff() / edges.diff()).tolist()


def verdict_of(
    crowding: float, spread: float, clipped_error: float, gaussian: float, uniform: float, sample: int
) -> str:
    """One word for the error of a site, by the thresholds above.

    Args:
        crowding: share of the values on the code that most of them are on.
        spread: standard deviation of the error in steps.
        clipped_error: share of the squared error that clipped values make.
        gaussian, uniform: Kolmogorov distances to the fitted Gaussian and to the uniform law.
        sample: number of errors that these distances are from. A small tensor gets the distance that chance alone
            brings on top of what is allowed, and the uniform law, which rounding theory expects, the benefit of it.

    Returns:
        "degenerate": no spread, or nearly all values on one code, or far from both laws, which happens where the values
        crowd on a few codes; "clipped": the error is mostly that of the clipped values; else the nearer law, "uniform"
        or "gaussian".
    """
    if crowding >= CROWDED or not spread > STILL:
        return "degenerate"
    if clipped_error >= CLIPPED:
        return "clipped"
    chance = SCATTER / math.sqrt(max(1, sample))
    if uniform <= min(CLOSE, gaussian) + chance:
        return "uniform"
    return "gaussian" if gaussian <= CLOSE + chance else "degenerate"
