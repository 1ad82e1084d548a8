"""DoReFa's weights against equation 9 of its paper."""

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.quantizers import DoReFaQuantizer, fit_grid
from planish.scheme import Format


def dorefa_twin(w, bits):
    """2 quantize_k(tanh w / (2 max|tanh w|) + 1/2) - 1, as in the paper, and the scale back on."""
    most, n = w.tanh().abs().max(), 2**bits - 1
    unit = w.tanh() / (2 * most) + 0.5
    return most * (2 * (unit * n).round() / n - 1)


def started(bits, w):
    tap = DoReFaQuantizer(Format(bits, "tensor", half_integer=True))
    tap.initialize(w, fit_grid(w, tap.format))
    return tap


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_and_levels(bits):
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(bits))
    tap = started(bits, w)
    out = tap(w.clone().requires_grad_())
    torch.testing.assert_close(out, dorefa_twin(w, bits))
    levels = out.unique()
    assert len(levels) == 2**bits
    torch.testing.assert_close(levels, -levels.flip(0))
    assert torch.equal(out, tap.baked()(tap.latent(w)))
    assert torch.equal(out, fake_quantize(w.tanh(), tap.grid))


def test_the_gradient_takes_the_slope_of_tanh():
    w = torch.linspace(-2, 2, 9).requires_grad_()
    started(2, w.detach())(w).sum().backward()
    torch.testing.assert_close(w.grad, 1 - w.detach().tanh() ** 2)


def test_zeros_make_no_nan():
    w = torch.zeros(4, 4, requires_grad=True)
    out = started(2, w.detach())(w)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(w.grad).all()


def test_the_format_has_to_fit():
    for fmt in (Format(4, "tensor"), Format(4, "channel", half_integer=True)):
        with pytest.raises(PlanishError, match="half-integer grid with one scale"):
            DoReFaQuantizer(fmt).initialize(torch.ones(2, 2), fit_grid(torch.ones(2, 2), fmt))
