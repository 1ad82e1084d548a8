"""StatsQ against the equations of its paper."""

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.quantizers import StatsQuantizer, fit_grid
from planish.quantizers.statistics import near_threshold
from planish.scheme import Format


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def started(bits, w, axis=0):
    tap = StatsQuantizer(Format(bits, "channel", half_integer=True), channel_axis=axis)
    tap.initialize(w, fit_grid(w, tap.format, channel_axis=axis))
    return tap


def stats_twin(w, bits):
    """alpha = 2 mean|w| of each row; w / alpha clipped to [-1, 1 - 1e-6]; k = round(n w / alpha - 1/2)."""
    n, out = 2 ** (bits - 1), torch.empty_like(w)
    for i, row in enumerate(w):
        alpha = 2 * row.abs().mean()
        k = ((row / alpha).clamp(-1, 1 - 1e-6) * n - 0.5).round()
        out[i] = alpha * (k + 0.5) / n
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3)])
def test_values(bits, shape):
    w = draw(*shape)
    tap = started(bits, w)
    out = tap(w.clone().requires_grad_())
    torch.testing.assert_close(out, stats_twin(w, bits))
    assert torch.equal(out, tap.baked()(w))
    assert torch.equal(out, fake_quantize(w, tap.grid))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_symmetric_evenly_spread_and_none_is_zero(bits):
    w = draw(1, 4000)
    levels = started(bits, w)(w).unique()
    assert len(levels) == 2**bits
    torch.testing.assert_close(levels, -levels.flip(0))
    alpha = 2 * w.abs().mean()
    torch.testing.assert_close(levels.diff(), torch.full((2**bits - 1,), (alpha / 2 ** (bits - 1)).item()))


def test_scale_equivariant_and_odd():
    w = draw(4, 300, dtype=torch.float64)
    tap = started(3, w)
    torch.testing.assert_close(tap(3.7 * w), 3.7 * tap(w))
    torch.testing.assert_close(tap(-w), -tap(w))


def test_occupancy_and_error_of_gaussian_weights():
    """The figures of the notes on the paper: 21.3, 28.7, 28.8 and 21.2 % at 2 bits; a floor of the error at 8."""
    w = draw(1, 400_000)
    out = started(2, w)(w)
    share = torch.stack([(out == level).float().mean() for level in out.unique()])
    torch.testing.assert_close(share, torch.tensor([0.2125, 0.2875, 0.2875, 0.2125]), atol=0.004, rtol=0)
    for bits, error in [(2, 0.138), (3, 0.071), (4, 0.049), (8, 0.036)]:
        relative = (started(bits, w)(w) - w).square().mean() / w.square().mean()
        assert relative.item() == pytest.approx(error, abs=0.003)
    even = torch.linspace(-1, 1, 100_001)[None, :]
    out = started(2, even)(even)
    assert all((out == level).float().mean().item() == pytest.approx(0.25, abs=0.001) for level in out.unique())


def test_the_gradient_is_the_identity_outside_the_range_too():
    w = (5 * draw(3, 20)).requires_grad_()
    weights = draw(3, 20, seed=1)
    (started(2, w.detach())(w) * weights).sum().backward()
    assert torch.equal(w.grad, weights)


def test_with_a_band_it_reaches_undecided_weights_only():
    w = draw(2, 400).requires_grad_()
    tap = started(2, w.detach())
    tap.band = 0.1
    tap(w).sum().backward()
    grid = tap.grid
    thresholds = torch.tensor([-1.0, 0.0, 1.0])  # in steps, of four levels at -1.5, -0.5, 0.5 and 1.5
    distance = (w.detach() / grid.scale)[..., None].sub(thresholds).abs().min(-1).values
    assert torch.equal(w.grad != 0, distance <= 0.1)
    assert 0 < (w.grad != 0).float().mean() < 0.3


@pytest.mark.parametrize(("bits", "share"), [(2, 0.0078), (4, 0.0087)])
def test_share_of_undecided_gaussian_weights(bits, share):
    w = draw(1, 1_000_000)
    undecided = near_threshold(w, started(bits, w).grid, 0.005).float().mean().item()
    assert undecided == pytest.approx(share, rel=0.08)


def test_zeros_and_bfloat16():
    zeros = torch.zeros(3, 5, requires_grad=True)
    out = started(2, zeros.detach())(zeros)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(zeros.grad).all()
    w = draw(3, 50)
    tap = started(2, w)
    half = w.bfloat16().requires_grad_()
    out = tap(half)
    assert out.dtype == torch.bfloat16
    assert tap.grid.scale.dtype == torch.float32


def test_the_format_has_to_be_half_integer():
    with pytest.raises(PlanishError, match="half-integer"):
        StatsQuantizer(Format(4, "channel")).initialize(draw(2, 2), fit_grid(draw(2, 2), Format(4, "channel")))
