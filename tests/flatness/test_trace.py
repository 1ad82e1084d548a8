"""Traces against dense Hessians, and the scatter against its formula."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from planish.flatness import trace
from planish.flatness.hessian import Hessian
from planish.flatness.lanczos import lanczos
from planish.flatness.trace import Estimate, random_signs, trace_samples
from tests.flatness.hessians import double_problem, true_hessian
from tests.flatness.networks import attention_net, conv_net
from tests.flatness.quadratic import Quadratic, mean_output, nothing


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _small() -> Hessian:
    """Eight weights in two layers of four, with a Hessian that is not diagonal."""
    half = torch.randn(8, 8, generator=_generator(), dtype=torch.float64)
    return Hessian(Quadratic(half + half.T, parts=2), nothing(), loss=mean_output)


def _every_sign(monkeypatch) -> None:
    """Instead of random signs: all of them in turn."""
    signs = itertools.product([-1.0, 1.0], repeat=8)
    monkeypatch.setattr(trace, "random_signs", lambda *_: torch.tensor(next(signs), dtype=torch.float64))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_mean_over_all_signs_is_the_trace(steps, monkeypatch):
    hessian = _small()
    krylov = lanczos(hessian, steps, generator=_generator(1)) if steps else None
    _every_sign(monkeypatch)
    samples = trace_samples(hessian, 2**8, generator=_generator(), krylov=krylov)
    expected = hessian.dense().diagonal().view(2, 4).sum(1)
    torch.testing.assert_close(samples.mean(0), expected, rtol=1e-10, atol=1e-10)
    assert samples.std(0).min() > 0


def test_the_scatter_is_that_of_the_off_diagonal(monkeypatch):
    hessian = _small()
    _every_sign(monkeypatch)
    samples = trace_samples(hessian, 2**8, generator=_generator()).sum(1)
    matrix = hessian.dense()
    # Var = 2 (|H|_F^2 - sum of H_ii^2), Avron & Toledo 2011
    expected = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert samples.var(correction=0).item() == pytest.approx(expected.item())


def test_a_whole_subspace_leaves_no_scatter():
    hessian = _small()
    krylov = lanczos(hessian, 8, generator=_generator(1))
    samples = trace_samples(hessian, 3, generator=_generator(), krylov=krylov)
    expected = hessian.dense().diagonal().view(2, 4).sum(1).expand(3, 2)
    torch.testing.assert_close(samples, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [conv_net, attention_net])
@pytest.mark.parametrize("steps", [0, 20])
def test_networks_within_the_error(make, steps):
    model, batches = double_problem(make)
    hessian = Hessian(model, batches)
    krylov = lanczos(hessian, steps, generator=_generator(1)) if steps else None
    samples = trace_samples(hessian, 60, generator=_generator(), krylov=krylov)
    diagonal = true_hessian(make).diagonal()
    parts = diagonal.split([p.numel() for p in model.parameters()])
    for column, part in zip(samples.T, parts, strict=True):
        estimate = Estimate.of(column)
        assert abs(estimate.value - part.sum().item()) <= 4 * estimate.error + 1e-9
    whole = Estimate.of(samples.sum(1))
    assert abs(whole.value - diagonal.sum().item()) <= 4 * whole.error
    assert whole.error < 0.25 * whole.value


def test_a_subspace_lowers_the_scatter():
    hessian = Hessian(*double_problem(conv_net))
    krylov = lanczos(hessian, 60, generator=_generator(1))
    plain = trace_samples(hessian, 60, generator=_generator()).sum(1)
    rest = trace_samples(hessian, 60, generator=_generator(), krylov=krylov).sum(1)
    assert rest.std() < 0.5 * plain.std()


def test_blocks_change_nothing():
    model, batches = double_problem(attention_net)
    one, several = Hessian(model, batches), Hessian(model, batches, memory=100_000)
    assert one.block == 1
    assert several.block > 1
    a, b = (trace_samples(hessian, 9, generator=_generator()) for hessian in (one, several))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_signs_are_signs():
    signs = random_signs(Hessian(Quadratic(torch.ones(1000)), nothing(), loss=mean_output), _generator())
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.sum().item()) < 5 * math.sqrt(1000)


def test_estimates():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert estimate.value == 3
    assert estimate.error == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(Estimate.of(torch.ones(1)).error)
    assert Estimate.exact(torch.ones(1)) == Estimate(1.0, 0.0)
