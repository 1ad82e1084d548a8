"""A weight that is rounded only when it is baked, to the grid of what it is then."""

import torch

from planish.functional import fake_quantize
from planish.quantizers import LaterQuantizer, UniformQuantizer, fit_grid
from planish.scheme import Format


def test_it_passes_everything_on_and_rounds_when_baked():
    tap, x = LaterQuantizer(Format(2, "channel", half_integer=True)), torch.randn(4, 9).requires_grad_()
    assert tap(x) is x
    assert not list(tap.parameters())
    with torch.no_grad():
        x.mul_(2)  # as an optimizer does
    baked = tap.baked()
    assert isinstance(baked, UniformQuantizer)
    assert torch.equal(baked(x), fake_quantize(x, fit_grid(x, tap.format)))
