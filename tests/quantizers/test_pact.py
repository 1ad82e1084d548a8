"""PACT against its equations spelled out."""

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.quantizers import PACTQuantizer, fit_grid
from planish.scheme import Format

FORMAT = Format(4, "tensor", symmetric=False)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def started(x, **options):
    tap = PACTQuantizer(FORMAT, **options)
    tap.initialize(x, fit_grid(x, FORMAT))
    return tap


def pact_twin(x, alpha, bits):
    """Equations 1 and 2: y = (|x| - |x - alpha| + alpha) / 2, then rounded to 2^bits - 1 steps of alpha."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    levels = 2**bits - 1
    rounded = (y * levels / alpha).round() * alpha / levels
    return y + (rounded - y).detach()


def test_inputs_that_are_never_negative():
    x = draw(30, 7).abs()
    tap = started(x, start=1.3)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    alpha = torch.tensor(1.3, requires_grad=True)
    weights = draw(30, 7)
    out, twin = tap(ours), pact_twin(theirs, alpha, 4)
    torch.testing.assert_close(out, twin)
    (out * weights).sum().backward()
    (twin * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(tap.alpha.grad, alpha.grad)  # 1 where clipped, 0 elsewhere (equation 3)


def test_inputs_of_both_signs_are_clipped_on_both_sides():
    x = draw(30, 8)
    tap = started(x, start=0.8)
    leaf = x.clone().requires_grad_()
    out = tap(leaf)
    assert out.min() >= -0.8 * 16 / 15 - 1e-6
    assert out.max() <= 0.8 + 1e-6
    out.sum().backward()
    assert torch.equal(leaf.grad, ((x < 0.8) & (x > -0.8)).float())
    assert tap.alpha.grad == (x >= 0.8).sum() - (x <= -0.8).sum()


@pytest.mark.parametrize("make", [lambda: draw(9, 9), lambda: draw(9, 9).abs(), lambda: torch.zeros(4, 4)])
def test_starts_at_the_calibrated_range_and_bakes_what_it_computes(make):
    x = make()
    tap = started(x)
    grid = fit_grid(x, FORMAT)
    ends = (torch.tensor([0.0, 15.0]) - grid.zero_point).abs() * grid.scale
    assert tap.alpha == (ends.max() if bool((x < 0).any()) else ends[1])
    out = tap(x.clone().requires_grad_())
    assert torch.isfinite(out).all()
    assert torch.equal(out, tap.baked()(x))
    assert torch.equal(out, fake_quantize(x, tap.grid))


def test_alpha_stays_positive():
    tap = started(draw(5, 5))
    tap.alpha.data.fill_(-3.0)
    tap.keep_valid()
    assert tap.alpha > 0
    assert torch.isfinite(tap(draw(5, 5))).all()


def test_errors():
    with pytest.raises(PlanishError, match="positive"):
        PACTQuantizer(FORMAT, start=0.0)
    tap = PACTQuantizer(Format(4, "token", symmetric=False))
    with pytest.raises(PlanishError, match="granularity tensor"):
        tap.initialize(draw(4, 4), fit_grid(draw(4, 4), tap.format))
