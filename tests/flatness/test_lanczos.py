"""Eigenvalues against dense solvers and known spectra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from planish.flatness.hessian import Hessian
from planish.flatness.lanczos import Krylov, lanczos
from tests.flatness.hessians import double_problem, true_hessian
from tests.flatness.networks import attention_net, conv_net
from tests.flatness.quadratic import Quadratic, mean_output, nothing, with_spectrum


def _of(matrix: Tensor) -> Hessian:
    return Hessian(Quadratic(matrix), nothing(), loss=mean_output)


def _run(hessian: Hessian, steps: int, seed: int = 0, **options) -> Krylov:
    return lanczos(hessian, steps, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("make", [conv_net, attention_net])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_top_five_are_those_of_the_dense_hessian(make, dtype):
    model, batches = double_problem(make)
    model, batches = model.to(dtype), [(x.to(dtype), y) for x, y in batches]
    found = _run(Hessian(model, batches), 150, wanted=5)
    expected = torch.linalg.eigvalsh(true_hessian(make)).flip(0)
    values, residuals, _ = found.ritz()
    torch.testing.assert_close(values[:5], expected[:5], rtol=1e-4, atol=0)
    assert len(values) < 150  # it noticed that it was done
    assert (residuals[:5] <= 1.1e-4 * values[:5]).all()


def test_the_lowest_is_found_too():
    hessian = Hessian(*double_problem(attention_net))
    expected = torch.linalg.eigvalsh(true_hessian(attention_net))[0].item()
    assert expected < 0
    assert _run(hessian, 100).ritz()[0][-1].item() == pytest.approx(expected, rel=1e-4)


def test_the_basis_is_orthonormal_and_the_recurrence_holds():
    matrix = with_spectrum(torch.linspace(-1, 3, 60, dtype=torch.float64))
    found = _run(_of(matrix), 25)
    v, t = found.basis, found.matrix
    torch.testing.assert_close(v @ v.T, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(v @ matrix @ v.T, t, rtol=0, atol=1e-12)
    rest = matrix @ v.T - v.T @ t
    assert rest[:, :-1].abs().max() < 1e-12
    assert rest[:, -1].norm().item() == pytest.approx(found.coupling)


def test_residuals_are_what_they_say():
    matrix = with_spectrum(torch.linspace(-1, 3, 60, dtype=torch.float64))
    found = _run(_of(matrix), 12)
    values, residuals, weights = found.ritz()
    _, vectors = torch.linalg.eigh(found.matrix)
    ritz_vectors = found.basis.T @ vectors.flip(1)
    true = (matrix @ ritz_vectors - ritz_vectors * values).norm(dim=0)
    torch.testing.assert_close(residuals, true, rtol=1e-8, atol=1e-12)
    assert weights.sum().item() == pytest.approx(1)


def test_all_steps_give_all_eigenvalues():
    spectrum = torch.tensor([-2.0, -1, 0, 0.5, 3, 7], dtype=torch.float64)
    values, residuals, _ = _run(_of(with_spectrum(spectrum)), 100).ritz()
    torch.testing.assert_close(values, spectrum.flip(0), rtol=1e-10, atol=1e-10)
    assert residuals.max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_and_round_losses_do_not_break_it(dtype):
    for value in (0.0, 2.5):
        values, residuals, weights = _run(_of(torch.full((40,), value, dtype=dtype)), 20, wanted=5).ritz()
        torch.testing.assert_close(values, torch.full((5,), value, dtype=torch.float64), rtol=1e-6, atol=0)
        assert residuals.abs().max() == 0
        assert torch.isfinite(weights).all()


def test_few_eigenvalues_apart_from_zero():
    spectrum = torch.zeros(50, dtype=torch.float64)
    spectrum[:2] = torch.tensor([4.0, 1.0])
    values, _, weights = _run(_of(spectrum), 20, wanted=5).ritz()
    torch.testing.assert_close(values[:5], spectrum[:5], rtol=1e-8, atol=1e-8)
    assert weights.sum().item() == pytest.approx(1)


def test_the_seed_decides():
    hessian = _of(torch.linspace(0, 1, 30))
    a, b, c = (_run(hessian, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(a.basis, b.basis)
    assert not torch.equal(a.basis, c.basis)
