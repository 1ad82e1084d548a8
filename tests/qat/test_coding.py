"""The coding length against determinants of NumPy and the sums of its definition, and its properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.errors import PlanishError
from planish.qat.coding import (
    coding_length,
    coding_share,
    largest,
    log_determinant,
    magnitude_groups,
    norm_bound,
    series,
    unit_rows,
)


def draw(m, d, seed=0, dtype=torch.float64):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread(m=128, d=64, seed=0):
    return unit_rows(draw(m, d, seed))


def collapsed(m=128, d=64):
    return torch.full((m, d), d**-0.5, dtype=torch.float64)


def gram(p, z, eps2):
    """MEC's matrix: lambda P Z^T with lambda = d / (m eps^2)."""
    m, d = z.shape
    return d / (m * eps2) * p.numpy() @ z.numpy().T


def twin(z, eps2, p=None):
    """logdet(I + lambda P Z^T), by NumPy."""
    return np.linalg.slogdet(np.eye(len(z)) + gram(z if p is None else p, z, eps2))[1]


def twin_series(z, eps2, order, p=None):
    """Tr sum_k (-1)^(k+1) C^k / k."""
    c = gram(z if p is None else p, z, eps2)
    return sum((-1) ** (k + 1) * np.trace(np.linalg.matrix_power(c, k)) / k for k in range(1, order + 1))


def twin_experts(z, gates, eps2):
    """R = sum_k (n_k + d)/2 logdet(I + d/(n_k eps^2) Z^T diag(pi_k) Z), gates pi_k in the columns."""
    d, total = z.shape[1], 0.0
    for gate in gates.T:
        n = gate.sum()
        total += (n + d) / 2 * np.linalg.slogdet(np.eye(d) + d / (n * eps2) * z.T @ np.diag(gate) @ z)[1]
    return total


@pytest.mark.parametrize("eps2", [0.05, 1.0, 64.0])
@pytest.mark.parametrize(("m", "d"), [(12, 5), (5, 12), (7, 7), (1, 3)])
def test_the_determinant_of_either_product(m, d, eps2):
    z, p = spread(m, d), spread(m, d, seed=1)
    assert log_determinant(z, eps2).item() == pytest.approx(twin(z, eps2), rel=1e-12)
    assert log_determinant(z, eps2, other=p).item() == pytest.approx(twin(z, eps2, p), rel=1e-9)
    assert log_determinant(z.float(), eps2).item() == pytest.approx(twin(z, eps2), rel=1e-5)


def test_the_numbers_of_the_notes():
    """Spread: measured with a draw of NumPy's; ours is another one of the same kind."""
    z, flat = spread(), collapsed()
    assert log_determinant(z, 4).item() == pytest.approx(13.676, abs=0.1)
    assert twin_series(z, 4, 1) == pytest.approx(16)
    assert twin_series(z, 4, 2) == pytest.approx(13.01, abs=0.15)
    assert twin_series(z, 4, 4) == pytest.approx(13.58, abs=0.12)
    assert log_determinant(z, 64).item() == pytest.approx(0.9885, abs=5e-4)
    assert twin_series(z, 64, 4) == pytest.approx(log_determinant(z, 64).item(), abs=1e-6)
    assert twin_series(flat, 4, 4) < -14_000  # as it stands, the series of collapsed features diverges
    assert log_determinant(flat, 4).item() == pytest.approx(math.log(17))
    assert log_determinant(flat, 4, order=4).item() == pytest.approx(35.7, abs=0.1)
    assert log_determinant(flat, 4, order=12).item() == pytest.approx(9.4, abs=0.1)
    assert log_determinant(flat, 64, order=12).item() == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("order", [2, 4, 8])
def test_without_a_shift_it_is_the_series_of_mec(order):
    z, p = spread(20, 8), spread(20, 8, seed=1)
    c = torch.from_numpy(gram(p, z, 64))
    assert norm_bound(c) < 0.9
    assert log_determinant(z, 64, other=p, order=order).item() == pytest.approx(twin_series(z, 64, order, p), rel=1e-12)


def test_two_views_too_large_for_the_series_are_scaled_as_by_a_larger_distortion():
    z, p = spread(20, 8), unit_rows(spread(20, 8) + 0.3 * draw(20, 8, 1))
    bound = norm_bound(p.T @ z * (8 / (20 * 0.1))).item()
    larger = 0.1 * bound / 0.9
    assert larger > 0.1
    expected = larger / 0.1 * twin_series(z, larger, 4, p)
    assert log_determinant(z, 0.1, other=p, order=4).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12), d=st.integers(1, 12), rank=st.integers(1, 12), eps2=st.floats(0.01, 100),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_shifted_series_converges_to_the_determinant_whatever_the_spectrum(m, d, rank, eps2, seed):
    z = unit_rows(draw(m, rank, seed) @ draw(rank, d, seed + 1))
    exact = log_determinant(z, eps2).item()
    c = z @ z.mT * (d / (m * eps2))
    bound = norm_bound(c).item()
    assert bound >= torch.linalg.eigvalsh(c).max().item() - 1e-9
    rate = bound / (2 + bound)
    errors = [abs(log_determinant(z, eps2, order=order).item() - exact) for order in (4, 64)]
    for order, error in zip((4, 64), errors, strict=True):
        # the rest of a geometric series for each eigenvalue
        assert error <= m * rate ** (order + 1) / (order + 1) / (1 - rate) + 1e-6


def test_even_orders_only_as_an_odd_one_rewards_equal_vectors():
    flat, z = collapsed(), spread()
    assert twin_series(flat, 4, 3) > twin_series(z, 4, 3)
    for order in (2, 4, 8):
        assert twin_series(flat, 4, order) < twin_series(z, 4, order)
    for order in (0, 1, 3, -2):
        with pytest.raises(PlanishError, match=f"order {order}: give an even number"):
            log_determinant(z, 4, order=order)
    with pytest.raises(PlanishError, match="eps2 of 0: it is positive"):
        log_determinant(z, 0)


def test_the_term_of_order_one_has_no_gradient():
    x = draw(6, 4).requires_grad_()
    z = unit_rows(x)
    torch.trace(z.T @ z * (4 / (6 * 4))).backward()
    assert x.grad.abs().max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 20), d=st.integers(1, 20), eps2=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_bounds(m, d, eps2, seed):
    z, p = spread(m, d, seed), spread(m, d, seed + 1)
    value, most = log_determinant(z, eps2).item(), largest(m, d, eps2)
    assert math.log1p(d / eps2) - 1e-9 <= value <= most + 1e-9
    assert log_determinant(z, eps2, other=p).item() <= most + 1e-9
    assert 0 < coding_share(z, eps2).item() <= 1 + 1e-9
    if m >= d:
        assert most == pytest.approx(d * math.log1p(1 / eps2))


@pytest.mark.parametrize(("m", "d"), [(12, 4), (3, 8)])
def test_the_largest_is_reached_by_equal_directions_and_the_smallest_by_equal_vectors(m, d):
    even = torch.eye(d, dtype=torch.float64).repeat(-(-m // d), 1)[:m]
    for eps2 in (0.1, 4.0):
        assert coding_share(even, eps2).item() == pytest.approx(1)
        assert log_determinant(collapsed(m, d), eps2).item() == pytest.approx(math.log1p(d / eps2))


def test_rotations_and_permutations_change_nothing():
    z, p = spread(10, 6), spread(10, 6, seed=1)
    rotation = torch.linalg.qr(draw(6, 6, 2))[0]
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for order in (None, 4):
        one, two = log_determinant(z, 0.5, order=order), log_determinant(z, 0.5, other=p, order=order)
        torch.testing.assert_close(log_determinant(z @ rotation, 0.5, order=order), one)
        torch.testing.assert_close(log_determinant(z[shuffled], 0.5, order=order), one)
        torch.testing.assert_close(log_determinant(z[shuffled], 0.5, other=p[shuffled], order=order), two)
        turned = log_determinant(z @ rotation, 0.5, other=p @ rotation, order=order)
        torch.testing.assert_close(turned, two)
        torch.testing.assert_close(log_determinant(p, 0.5, other=z, order=order), two)  # L12 = L21


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("d", [4, 9])
def test_experts_are_the_gates_of_the_definition(experts, d):
    x = (
        draw(14, d)
        * torch.linspace(0.1, 5, 14)[torch.randperm(14, generator=torch.Generator().manual_seed(0))][:, None]
    )
    z, groups = unit_rows(x), magnitude_groups(x.norm(dim=1), experts)
    gates = np.zeros((14, experts))
    for k, group in enumerate(groups):
        gates[group, k] = 1
    edges = np.quantile(x.norm(dim=1), np.linspace(0, 1, experts + 1), method="closest_observation")
    for k, group in enumerate(groups):
        inside = x[group].norm(dim=1)
        assert abs(len(group) - 14 / experts) < 1
        assert inside.min() >= edges[k] - 1e-12
        assert inside.max() <= edges[k + 1] + 1e-12 or k + 1 < experts
    assert coding_length(z, 0.5, groups=groups).item() == pytest.approx(twin_experts(z.numpy(), gates, 0.5))
    if experts == 1:
        torch.testing.assert_close(coding_length(z, 0.5, groups=groups), coding_length(z, 0.5))
        torch.testing.assert_close(coding_share(z, 0.5, groups=groups), coding_share(z, 0.5))
        assert coding_length(z, 0.5).item() == pytest.approx((14 + d) / 2 * twin(z, 0.5))


def test_groups_follow_the_magnitudes_and_have_two_members_at_least():
    groups = magnitude_groups(torch.tensor([5.0, 1, 4, 2, 3]), 2)
    assert [group.tolist() for group in groups] == [[1, 3, 4], [2, 0]]
    assert len(magnitude_groups(torch.arange(5), 8)) == 2
    assert len(magnitude_groups(torch.arange(1), 8)) == 1
    with pytest.raises(PlanishError, match="0 experts"):
        magnitude_groups(torch.arange(3), 0)


@pytest.mark.parametrize("eps2", [0.05, 1.0, 10.0])
def test_an_expert_of_its_own_keeps_the_tail_from_being_lost(eps2):
    """60 small vectors in half of the space, 4 large ones close to one direction of the other half."""
    x = torch.zeros(64, 8, dtype=torch.float64)
    x[:60, :4] = draw(60, 4)
    x[60:] = 20 * draw(4, 8, 1)
    x[60:, 4] += 100
    tail = [torch.arange(60), torch.arange(60, 64)]

    def pull(groups):
        """The gradient along the sphere of a vector in the tail, over that of another one."""
        z = unit_rows(x).requires_grad_()
        coding_share(z, eps2, groups=groups).backward()
        along = (z.grad - (z.grad * z).sum(1, keepdim=True) * z).detach().norm(dim=1)
        return along[60:].mean() / along[:60].mean()

    assert pull(tail) > 1.2 * pull(None)


def test_the_shift_is_a_constant_to_the_gradient():
    c = spread(6, 6).T @ spread(6, 6)
    leaf, twin_leaf = c.clone().requires_grad_(), c.clone().requires_grad_()
    shift = norm_bound(c) / 2
    x = (twin_leaf - shift * torch.eye(6)) / (1 + shift)
    expected = torch.trace(x - x @ x / 2) + 6 * torch.log(1 + shift)
    expected.backward()
    got = series(leaf, 2)
    got.backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(leaf.grad, twin_leaf.grad)


@pytest.mark.parametrize("order", [None, 4])
@pytest.mark.parametrize("two", [False, True])
def test_gradients(order, two):
    x, p = draw(6, 4).requires_grad_(), spread(6, 4, seed=1) if two else None
    if two:
        p = unit_rows(x.detach() + 0.2 * p)

    def share(x):
        return coding_share(unit_rows(x), 40.0, other=p, order=order)

    # of the series they are the true ones as far as it has converged
    assert torch.autograd.gradcheck(share, x, atol=1e-4 if order and not two else 1e-5)


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient():
    x = draw(5, 3, dtype=torch.float32)
    x[2] = 0
    x.requires_grad_()
    assert unit_rows(x)[2].tolist() == [0, 0, 0]
    for order in (None, 4):
        coding_share(unit_rows(x), 1.0, groups=magnitude_groups(x.norm(dim=1), 2), order=order).backward()
        assert torch.isfinite(x.grad).all()
    # beside another view a row of zeros does have a gradient: that of the vector itself, of no great size
    other = unit_rows(draw(5, 3, 1, torch.float32))
    x.grad = None
    coding_share(unit_rows(x), 1.0, other=other).backward()
    assert 0 < x.grad[2].abs().max() < 1
    zeros = torch.zeros(4, 3, requires_grad=True)
    coding_share(unit_rows(zeros), 1.0).backward()
    assert torch.isfinite(zeros.grad).all()
    assert coding_share(unit_rows(torch.zeros(4, 3)), 1.0) == 0


def test_tiny_and_huge_rows():
    for scale in (1e-25, 1e25):
        x = (draw(5, 3, dtype=torch.float32) * scale).requires_grad_()
        z = unit_rows(x)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
        coding_share(z, 1.0).backward()
        assert torch.isfinite(x.grad).all()


def test_half_precision_is_widened():
    x = draw(9, 4, dtype=torch.float32)
    assert unit_rows(x.bfloat16()).dtype == torch.float32
    assert log_determinant(unit_rows(x.bfloat16()), 1.0).item() == pytest.approx(
        twin(unit_rows(x.double()), 1.0), rel=0.02
    )


def test_ascent_spreads_equal_vectors():
    x = (collapsed(16, 4) + 0.01 * draw(16, 4)).requires_grad_()
    before = coding_share(unit_rows(x), 0.5).item()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-coding_share(unit_rows(x), 0.5)).backward()
        optimizer.step()
    assert before < 0.75
    assert coding_share(unit_rows(x), 0.5) > 0.999


def test_a_series_of_zero_is_zero():
    assert series(torch.zeros(3, 3), 4) == 0
    assert series(torch.zeros(3, 3), 4, shifted=False) == 0
