"""The quantization error of one tensor: its moments, its law, and what clipping and exact zeros have to do with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.flatness.subject import Batch, Subject
from planish.flatness.verdict import (
    Histogram,
    gaussian_law,
    histogram,
    kolmogorov_distance,
    uniform_law,
    verdict_of,
)
from planish.functional import Grid
from planish.network.sites import Site
from planish.quantizers import UniformQuantizer

SAMPLE = 65_536  # errors of a site that its law is judged by, taken at a fixed stride; moments are of all of them


@dataclass(frozen=True)
class SiteError:
    """The error of one quantized tensor.

    A value that is exactly zero lies on every grid with a zero level and makes no error, so a tensor behind a ReLU has
    about half the error variance of one without zeros. ``mean``, ``variance`` and ``variance_ratio`` are over all
    values, zeros included: that is the noise that the network meets. The law of the error (``kurtosis``, the distances,
    the histogram, and ``variance_nonzero``) is that of the values that do make one.

    Attributes:
        site, role, bits: its name; "weight", "input" or "operand"; the width of its codes.
        count: values looked at (of all images; weights once).
        mean, variance: of the error, in the unit of the tensor.
        step: root of the mean squared step, which is the step itself where there is one for the whole tensor.
        variance_ratio: variance / (step^2 / 12); 1 for a uniform error.
        clipped: share of the values beyond the ends of the grid.
        clipped_error: share of the squared error that they make.
        zeros: share of values that are exactly zero and so make no error.
        variance_nonzero, variance_ratio_nonzero: the same two without these values.
        mean_steps: mean error in steps, without them.
        kurtosis: excess kurtosis of the error in steps; -1.2 for the uniform law, 0 for the Gaussian.
        distance_gaussian, distance_uniform: Kolmogorov distance of the error in steps to the Gaussian of its own mean
            and variance, and to the uniform law on [-1/2, 1/2].
        crowding: share of the values on the code that most of them are on.
        verdict: see :func:`planish.flatness.verdict.verdict_of`.
        histogram: of the error in steps.
    """

    site: str
    role: str
    bits: int
    count: int
    mean: float
    variance: float
    step: float
    variance_ratio: float
    clipped: float
    clipped_error: float
    zeros: float
    variance_nonzero: float
    variance_ratio_nonzero: float
    mean_steps: float
    kurtosis: float
    distance_gaussian: float
    distance_uniform: float
    crowding: float
    verdict: str
    histogram: Histogram


class ErrorTap(nn.Module):
    """Lets a tensor pass and takes in the error that its quantizer would make of it.

    Args:
        site: where it stands; a weight is looked at once, however often it is read.
        quantizer: its fitted grid.
        images: how many images will pass, so that the sample is spread over all of them.
    """

    def __init__(self, site: Site, quantizer: UniformQuantizer, images: int) -> None:
        super().__init__()
        self.site, self.quantizer, self.images = site, quantizer, images
        self.count = 0
        self.sums = torch.zeros(10, dtype=torch.float64)
        self.errors: list[Tensor] = []  # sampled, in steps, without those of exact zeros
        self.codes: list[Tensor] = []  # sampled

    def forward(self, x: Tensor) -> Tensor:
        if not (self.site.is_weight and self.count):
            self.add(x.detach())
        return x

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in one tensor."""
        grid: Grid = self.quantizer.grid
        codes, errors, clipped = in_steps(x, grid)
        zeros = (x == 0) & (errors == 0)
        step = grid.scale.double().expand_as(x) if grid.scale.numel() > 1 else grid.scale.double()
        self.count += x.numel()
        absolute = errors * grid.scale
        powers = [errors]
        while len(powers) < 4:
            powers.append(powers[-1] * errors)
        parts = [zeros, clipped, *powers, absolute, absolute.square(), absolute.square() * clipped]
        total = [part.sum(dtype=torch.float64) for part in parts] + [step.square().mean() * x.numel()]
        self.sums = self.sums + torch.stack(total).cpu()
        stride = stride_of(x.numel(), self._budget(x))
        errors, codes, zeros = (part.flatten()[::stride] for part in (errors, codes, zeros))
        self.errors.append(errors[~zeros].cpu())
        self.codes.append(codes.cpu())

    def _budget(self, x: Tensor) -> int:
        if self.site.is_weight:
            return SAMPLE
        per_image = max(1, math.prod(self.site.shape))  # of one image; a shape of the tensor itself has several
        return max(1, SAMPLE * x.numel() // (per_image * self.images))

    def result(self) -> SiteError:
        """What was found."""
        n = self.count
        zero, clip, *power, e1, e2, clipped_e2, s2 = self.sums.tolist()
        present, step2 = n - zero, s2 / n
        mean, variance = e1 / n, max(0.0, e2 / n - (e1 / n) ** 2)
        variance_nonzero = max(0.0, e2 / present - (e1 / present) ** 2) if present else 0.0
        center, spread2, kurtosis = _moments(power, present)
        sample, codes = torch.cat(self.errors), torch.cat(self.codes)
        law = gaussian_law(center, spread2) if spread2 > 0 else None
        to_gaussian = kolmogorov_distance(sample, law) if law else math.nan
        to_uniform = kolmogorov_distance(sample, uniform_law)
        crowding = float(torch.unique(codes, return_counts=True)[1].max()) / codes.numel()
        share = clipped_e2 / e2 if e2 else 0.0
        return SiteError(
            site=self.site.name, role=self.site.role, bits=self.quantizer.format.bits,
            count=n, mean=mean, variance=variance, step=math.sqrt(step2), variance_ratio=12 * variance / step2,
            clipped=clip / n, clipped_error=share, zeros=zero / n, variance_nonzero=variance_nonzero,
            variance_ratio_nonzero=12 * variance_nonzero / step2, mean_steps=center, kurtosis=kurtosis,
            distance_gaussian=to_gaussian, distance_uniform=to_uniform, crowding=crowding,
            verdict=verdict_of(crowding, math.sqrt(spread2), share, to_gaussian, to_uniform, len(sample)),
            histogram=histogram(sample, law),
        )  # fmt: skip


def in_steps(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, errors divided by the step, and which values are clipped; each of the shape of x."""
    x = x if x.dtype == torch.float64 else x.float()
    steps = x / grid.scale - grid.offset
    rounded = steps.round() + grid.zero_point
    codes = rounded.clamp(grid.qmin, grid.qmax)
    return codes, codes - grid.zero_point - steps, codes != rounded


def stride_of(count: int, most: int) -> int:
    """A stride that leaves at most ``most`` of ``count`` values and shares no factor with it: no channel is missed."""
    stride = max(1, -(-count // most))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _moments(power: Sequence[float], count: float) -> tuple[float, float, float]:
    """Mean, variance and excess kurtosis from the sums of the first four powers."""
    if not count:
        return 0.0, 0.0, math.nan
    m1, m2, m3, m4 = (total / count for total in power)
    variance = max(0.0, m2 - m1**2)
    if variance < 1e-8:  # nothing but the rounding of float32
        return m1, variance, math.nan
    return m1, variance, (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2 - 3


def site_errors(subject: Subject, grids: Mapping[str, UniformQuantizer], batches: Sequence[Batch]) -> list[SiteError]:
    """The error of every site in ``grids``, in the order of execution."""
    count = sum(len(labels) for _, labels in batches)
    taps = {site.name: ErrorTap(site, grids[site.name], count) for site in subject.sites if site.name in grids}
    with subject.tapped(taps):
        subject.logits(batches)
    return [tap.result() for tap in taps.values()]
