"""Distances between laws against scipy, histograms against numpy, and what a verdict is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from planish.flatness.verdict import BINS, gaussian_law, histogram, kolmogorov_distance, uniform_law, verdict_of


def draw(kind: str, n: int = 5000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(n, generator=generator) - 0.5
    return {
        "uniform": u,
        "normal": 0.3 * torch.randn(n, generator=generator) + 0.1,
        "ties": (u * 8).round() / 8,
        "half zeros": u * (u > 0),
        "tails": torch.randn(n, generator=generator) ** 3,
    }[kind]


@pytest.mark.parametrize("kind", ["uniform", "normal", "ties", "half zeros", "tails"])
def test_distances_are_those_of_scipy(kind):
    sample = draw(kind)
    mean, deviation = sample.double().mean().item(), sample.double().std().item()
    expected = stats.ks_1samp(sample.double().numpy(), stats.norm(mean, deviation).cdf).statistic
    assert kolmogorov_distance(sample, gaussian_law(mean, deviation**2)) == pytest.approx(expected, abs=1e-12)
    expected = stats.ks_1samp(sample.double().numpy(), stats.uniform(-0.5, 1).cdf).statistic
    assert kolmogorov_distance(sample, uniform_law) == pytest.approx(expected, abs=1e-12)


def test_the_two_laws_are_as_far_apart_as_the_text_says():
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    gap = (uniform_law(grid) - gaussian_law(0.0, 1 / 12)(grid)).abs().max()
    assert float(gap) == pytest.approx(0.057, abs=5e-4)
    assert math.isnan(kolmogorov_distance(torch.zeros(0), uniform_law))


@pytest.mark.parametrize(("kind", "reach"), [("uniform", 1.0), ("normal", 1.0), ("tails", 32.0)])
def test_histograms_are_those_of_numpy(kind, reach):
    sample = draw(kind)
    found = histogram(sample, gaussian_law(0.1, 0.09))
    assert len(found.edges) == BINS + 1
    assert found.edges[-1] == -found.edges[0] == reach
    expected, _ = np.histogram(sample.double().clamp(-reach, reach).numpy(), found.edges)
    width = np.diff(found.edges)
    np.testing.assert_allclose(np.array(found.density) * width * len(sample), expected, atol=1.01)
    for density in (found.density, found.gaussian, found.uniform):
        assert np.sum(np.array(density) * width) == pytest.approx(1)
    inner = np.diff(stats.norm(0.1, 0.3).cdf(found.edges))[1:-1] / width[1:-1]
    np.testing.assert_allclose(found.gaussian[1:-1], inner, atol=1e-9)


def test_a_histogram_of_nothing_and_one_without_a_law():
    assert histogram(torch.full((10,), 0.25), None).gaussian == [0.0] * BINS
    assert histogram(torch.zeros(0), None).density == [0.0] * BINS


@pytest.mark.parametrize(
    ("expected", "changed"),
    [
        ("uniform", {}),
        ("gaussian", {"gaussian": 0.01, "uniform": 0.04}),
        ("uniform", {"gaussian": 0.01, "uniform": 0.04, "sample": 100}),  # too few to tell
        ("degenerate", {"gaussian": 0.09, "uniform": 0.08}),  # neither law
        ("uniform", {"gaussian": 0.09, "uniform": 0.08, "sample": 400}),  # ... which so few values do not show
        ("clipped", {"clipped_error": 0.6}),
        ("degenerate", {"crowding": 0.95, "clipped_error": 0.6}),
        ("degenerate", {"spread": 0.0}),
        ("degenerate", {"spread": math.nan}),
        ("degenerate", {"gaussian": math.nan, "uniform": math.nan}),
    ],
)
def test_the_verdict_goes_by_its_thresholds(expected, changed):
    usual = {"crowding": 0.2, "spread": 0.29, "clipped_error": 0.1, "gaussian": 0.057, "uniform": 0.004}
    assert verdict_of(**{**usual, "sample": 65_536, **changed}) == expected
