"""The spectral density of known spectra."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from planish.flatness.density import Density, broadened
from planish.flatness.hessian import Hessian
from planish.flatness.lanczos import lanczos
from tests.flatness.quadratic import Quadratic, mean_output, nothing


def _mass(density: Density, low: float, high: float) -> float:
    x, y = torch.tensor(density.x), torch.tensor(density.y)
    inside = (x >= low) & (x <= high)
    return torch.trapezoid(y[inside], x[inside]).item()


def test_all_eigenvalues_give_a_mixture_of_normals():
    values = torch.tensor([3.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    found = broadened([values], [torch.full((4,), 0.25, dtype=torch.float64)], width=0.05)
    expected = sum(stats.norm.pdf(found.x, loc=v, scale=0.2) for v in values.tolist()) / 4
    assert found.y == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert _mass(found, -10, 10) == pytest.approx(1, abs=1e-9)


def test_runs_count_alike():
    one, two = torch.tensor([0.0]), torch.tensor([1.0, 2.0])
    found = broadened([one, two], [torch.ones(1), torch.tensor([0.5, 0.5])])
    assert [_mass(found, v - 0.3, v + 0.3) for v in (0, 1, 2)] == pytest.approx([0.5, 0.25, 0.25], abs=1e-3)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_single_value_is_a_peak(value):
    found = broadened([torch.full((3,), value)], [torch.full((3,), 1 / 3)])
    assert _mass(found, -10, 10) == pytest.approx(1, abs=1e-6)
    assert sum(x * y for x, y in zip(found.x, found.y, strict=True)) / sum(found.y) == pytest.approx(value, abs=1e-6)


def test_quadrature_of_a_diagonal_loss():
    """A bulk with the density of a triangle, and three outliers that are three thousandths of it."""
    generator = torch.Generator().manual_seed(0)
    bulk = torch.rand(2, 2997, generator=generator, dtype=torch.float64).sum(0)  # on [0, 2], most of it at 1
    spectrum = torch.cat([bulk, torch.tensor([8.0, 9.0, 10.0], dtype=torch.float64)])
    hessian = Hessian(Quadratic(spectrum), nothing(), loss=mean_output)
    runs = [lanczos(hessian, 40, generator=torch.Generator().manual_seed(s)).ritz() for s in range(20)]
    found = broadened([run[0] for run in runs], [run[2] for run in runs])
    expected = broadened([spectrum], [torch.full((3000,), 1 / 3000, dtype=torch.float64)])
    for low, high in ((-1, 0.5), (0.5, 1), (1, 1.5), (1.5, 3), (-1, 3)):
        assert _mass(found, low, high) == pytest.approx(_mass(expected, low, high), abs=0.02)
    assert _mass(found, 7.5, 11) == pytest.approx(3 / 3000, rel=0.6)  # scatters as chi-squared does
    assert _mass(found, 4, 7) < 1e-6
    # moments of a quadrature are those of the spectrum, up to the scatter of the directions
    mean = sum((run[0] * run[2]).sum() for run in runs) / 20
    assert mean.item() == pytest.approx(spectrum.mean().item(), rel=0.01)
