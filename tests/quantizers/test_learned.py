"""Learned step sizes against PyTorch's own learnable fake quantization and against LSQ's equations spelled out."""

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers import LearnedQuantizer, fit_grid, learned_quantize
from planish.quantizers.learned import gradient_factor, lsq_plus_scale, lsq_scale
from planish.scheme import Format


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(x, grid, **options):
    """Value and gradients of a weighted sum of the quantized tensor."""
    leaves = [t.clone().requires_grad_() for t in (x, grid.scale, grid.zero_point)]
    out = learned_quantize(leaves[0], grid._replace(scale=leaves[1], zero_point=leaves[2]), **options)
    (out * draw(*x.shape, seed=9).to(out.dtype)).sum().backward()
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 3])
def test_one_scale_is_what_pytorch_computes(bits, zero_point):
    x, scale, factor = draw(4, 6, 5), torch.tensor([0.11]), 0.37
    zp = torch.tensor([float(min(zero_point, 2**bits - 1))])
    leaves = [t.clone().requires_grad_() for t in (x, scale, zp)]
    theirs = torch._fake_quantize_learnable_per_tensor_affine(*leaves, 0, 2**bits - 1, factor)
    (theirs * draw(4, 6, 5, seed=9)).sum().backward()
    out, *ours = gradients(x, Grid(scale, zp, 0, 2**bits - 1), factor=factor)
    torch.testing.assert_close(out, theirs.detach())
    for mine, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_scale_for_each_channel_is_what_pytorch_computes(bits):
    x, half = draw(5, 7, 3), 2 ** (bits - 1)
    scale, zp = torch.linspace(0.05, 0.4, 5), torch.zeros(5)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zp)]
    theirs = torch._fake_quantize_learnable_per_channel_affine(*leaves, 0, -half, half - 1, 0.5)
    (theirs * draw(5, 7, 3, seed=9)).sum().backward()
    grid = Grid(scale.reshape(5, 1, 1), zp.reshape(5, 1, 1), -half, half - 1)
    out, to_x, to_scale, to_zp = gradients(x, grid, factor=0.5)
    torch.testing.assert_close(out, theirs.detach())
    torch.testing.assert_close(to_x, leaves[0].grad)
    torch.testing.assert_close(to_scale.flatten(), leaves[1].grad, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(to_zp.flatten(), leaves[2].grad, rtol=2e-4, atol=2e-5)


def lsq_twin(x, scale, qmin, qmax, offset):
    """LSQ's equations 1 to 3 with the derivative taken by autograd: only the rounding is straight through."""
    v = (x / scale - offset).clamp(qmin, qmax)
    rounded = v + (v.round() - v).detach()
    return (rounded + offset) * scale


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("scale", [torch.tensor(0.3, dtype=torch.float64), 0.1 * torch.ones(4, 1, dtype=torch.float64)])
def test_gradients_are_those_of_the_equations(scale, offset):
    x = draw(4, 50, dtype=torch.float64)
    # between a limit and half a step beyond it, LSQ clips and PyTorch's kernels round back: values there are left out
    edge = ((x / scale - offset) > 1).logical_or((x / scale - offset) < -2)
    near = ((x / scale - offset) < 1.5).logical_and((x / scale - offset) > -2.5)
    x = torch.where(edge & near, 0.0, x)
    grid = Grid(scale, torch.zeros_like(scale), -2, 1, offset)
    out, to_x, to_scale, _ = gradients(x, grid)
    a, b = x.clone().requires_grad_(), scale.clone().requires_grad_()
    twin = lsq_twin(a, b, -2, 1, offset)
    (twin * draw(4, 50, seed=9).double()).sum().backward()
    torch.testing.assert_close(out, twin.detach())
    torch.testing.assert_close(to_x, a.grad)
    torch.testing.assert_close(to_scale, b.grad, rtol=1e-6, atol=1e-6)


def test_values_are_those_of_fake_quantize_bit_for_bit():
    for bits, granularity, symmetric, half in [
        (2, "channel", True, True), (4, "channel", True, False), (3, "tensor", False, False), (8, "token", False, False)
    ]:  # fmt: skip
        fmt = Format(bits, granularity, symmetric=symmetric, half_integer=half)
        x = draw(6, 9, seed=bits)
        tap = LearnedQuantizer(fmt)
        tap.initialize(x, fit_grid(x, fmt))
        trained = tap(x.clone().requires_grad_())
        assert torch.equal(trained, fake_quantize(x, tap.grid))
        assert torch.equal(trained, tap.baked()(x))
        with torch.no_grad():
            assert torch.equal(trained, tap(x))


def test_scale_and_zero_point_reach_the_parameters_with_lsqs_factor():
    fmt = Format(4, "tensor", symmetric=False)
    x = draw(8, 3, 5)
    tap = LearnedQuantizer(fmt, learn_zero_point=True, per_image=True)
    tap.initialize(x, fit_grid(x, fmt))
    tap(x).square().sum().backward()
    factor = gradient_factor(15, 15)  # 15 values of an image share the step, the largest code is 15
    assert factor == pytest.approx(1 / 15)
    grid = Grid(tap.scale.detach(), tap.zero_point.detach(), 0, 15)
    leaf, zp = grid.scale.clone().requires_grad_(), grid.zero_point.clone().requires_grad_()
    learned_quantize(x, grid._replace(scale=leaf, zero_point=zp)).square().sum().backward()
    torch.testing.assert_close(tap.scale.grad, leaf.grad * factor)
    torch.testing.assert_close(tap.zero_point.grad, zp.grad * factor)


def test_a_learned_zero_point_stays_whole_and_among_the_codes():
    fmt = Format(2, "tensor", symmetric=False)
    x = draw(40)
    tap = LearnedQuantizer(fmt, learn_zero_point=True)
    tap.initialize(x, fit_grid(x, fmt))
    for value, used in [(1.4, 1.0), (-3.7, 0.0), (7.2, 3.0), (2.6, 3.0)]:
        tap.zero_point.data.fill_(value)
        assert tap.grid.zero_point == used
        out = tap(x.clone().requires_grad_())
        assert torch.equal(out, fake_quantize(x, tap.grid))
        assert 0.0 in out


def test_a_scale_below_its_floor_is_lifted_and_can_rise_again():
    fmt = Format(4, "channel")
    x = draw(3, 10)
    tap = LearnedQuantizer(fmt)
    tap.initialize(x, fit_grid(x, fmt))
    tap.scale.data[0] = -1.0
    assert (tap.grid.scale > 0).all()
    tap(x).square().sum().backward()
    assert torch.isfinite(tap.scale.grad).all()
    assert tap.scale.grad[0] != 0
    tap.keep_valid()
    assert (tap.scale > 0).all()
    assert tap.scale[0] == tap.floor[0]


def test_first_steps_of_the_papers():
    x, grid = draw(4, 100), Grid(torch.ones(4, 1), torch.zeros(4, 1), -8, 7)
    torch.testing.assert_close(lsq_scale(x, grid), 2 * x.abs().mean(1, keepdim=True) / 7**0.5)
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True, unbiased=False)
    widest = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    torch.testing.assert_close(lsq_plus_scale(x, grid), widest / 8)
    for init, expected in [("lsq", lsq_scale(x, grid)), ("lsq+", lsq_plus_scale(x, grid)), ("calibrated", grid.scale)]:
        tap = LearnedQuantizer(Format(4, "channel"), init=init)
        tap.initialize(x, grid)
        torch.testing.assert_close(tap.scale.data, expected)


def test_zeros_make_no_nan():
    for init in ("calibrated", "lsq", "lsq+"):
        tap = LearnedQuantizer(Format(2, "channel", half_integer=True), init=init)
        x = torch.zeros(3, 8)
        tap.initialize(x, fit_grid(x, tap.format))
        leaf = x.clone().requires_grad_()
        tap(leaf).sum().backward()
        assert torch.isfinite(leaf.grad).all()
        assert torch.isfinite(tap.scale.grad).all()
        assert torch.isfinite(tap(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_scale(dtype):
    fmt = Format(4, "tensor", symmetric=False)
    x = draw(20, 4)
    tap = LearnedQuantizer(fmt, per_image=True)
    tap.initialize(x, fit_grid(x, fmt))
    scale = tap.scale.detach().clone()
    tap.to(dtype)
    assert tap.scale.dtype == torch.float32
    assert torch.equal(tap.scale, scale)
    out = tap(x.to(dtype).requires_grad_())
    assert out.dtype == dtype
    out.sum().backward()
    assert tap.scale.grad.dtype == torch.float32


def ewgs_twin(gradient, x, out, scale, delta):
    """EWGS, equation 5, with its values counted in steps of the grid."""
    return gradient * (1 + delta * gradient.sign() * ((x - out) / scale))


def test_element_wise_gradient_scaling():
    x, grid = draw(200), Grid(torch.tensor(0.2), torch.tensor(0.0), -100, 100)
    plain, pulled = gradients(x, grid), gradients(x, grid, pull=0.3)
    torch.testing.assert_close(pulled[1], ewgs_twin(plain[1], x, plain[0], 0.2, 0.3))
    torch.testing.assert_close(pulled[2], plain[2])


def test_state_dict_round_trip():
    fmt = Format(3, "channel")
    x = draw(5, 12)
    tap = LearnedQuantizer(fmt)
    tap.initialize(x, fit_grid(x, fmt))
    fresh = LearnedQuantizer(fmt)
    fresh.load_state_dict(tap.state_dict())
    assert torch.equal(fresh(x), tap(x))


def test_errors():
    with pytest.raises(PlanishError, match="calibrated, lsq or lsq"):
        LearnedQuantizer(Format(4), init="zero")
    with pytest.raises(PlanishError, match="group"):
        LearnedQuantizer(Format(4, "group"))
