"""A learned step between two learned shifts."""

import pytest
import torch

from planish.functional import fake_quantize
from planish.quantizers import ShiftedLearnedQuantizer, ShiftedQuantizer, fit_grid
from planish.scheme import Format

FORMAT = Format(4, "tensor", symmetric=False)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(x, axis=-1, fmt=FORMAT):
    tap = ShiftedLearnedQuantizer(fmt, per_image=True, feature_axis=axis)
    tap.initialize(x, fit_grid(x, fmt))
    with torch.no_grad():
        tap.before.copy_(0.3 * draw(*tap.before.shape, seed=1))
        tap.after.copy_(0.3 * draw(*tap.after.shape, seed=2))
    return tap


@pytest.mark.parametrize(("shape", "axis"), [((4, 7, 5), -1), ((4, 5, 7), -2), ((4, 3, 6, 6), -3), ((4, 5), -1)])
def test_values_gradients_and_what_is_baked(shape, axis):
    x = draw(*shape)
    tap = started(x, axis)
    features = [1] * len(shape)
    features[axis] = shape[axis]
    before, after = tap.before.detach().reshape(features), tap.after.detach().reshape(features)
    leaf = x.clone().requires_grad_()
    out = tap(leaf)
    torch.testing.assert_close(out, fake_quantize(x + before, tap.grid) + after)
    (out * draw(*shape, seed=3)).sum().backward()
    others = [d for d in range(len(shape)) if d != axis % len(shape)]
    torch.testing.assert_close(tap.after.grad, draw(*shape, seed=3).sum(others))
    torch.testing.assert_close(tap.before.grad, leaf.grad.sum(others))
    baked = tap.baked()
    assert isinstance(baked, ShiftedQuantizer)
    assert torch.equal(baked(x), out)


def test_shifts_start_at_zero():
    x = draw(3, 4)
    tap = ShiftedLearnedQuantizer(FORMAT, per_image=True)
    tap.initialize(x, fit_grid(x, FORMAT))
    assert torch.equal(tap(x), fake_quantize(x, fit_grid(x, FORMAT)))


def test_a_step_for_each_token():
    fmt = Format(4, "token", symmetric=False)
    x = draw(6, 5, 8) * torch.linspace(0.1, 3, 5)[:, None]
    tap = started(x, fmt=fmt)
    assert tap.scale.shape == (5, 1)
    tap(x.requires_grad_()).square().sum().backward()
    assert torch.isfinite(tap.scale.grad).all()


def test_state_dicts_load_into_fresh_quantizers():
    x = draw(4, 7, 5)
    tap = started(x)
    baked = tap.baked()
    fresh = ShiftedQuantizer(FORMAT)
    fresh.load_state_dict(baked.state_dict())
    assert torch.equal(fresh(x), baked(x))
    assert set(baked.state_dict()) == {"scale", "zero_point", "before", "after"}
