import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from planish.functional import Grid, dequantize, fake_quantize, limits, quantize
from planish.quantizers import fit_grid
from planish.scheme import GRANULARITIES, OBSERVERS, Format
from tests.quantizers import reference

torch.set_num_threads(1)

floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),  # subnormals and both ends of the range among them
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, -1e30, 0.5, 1e-45]),
    st.floats(-4, 4, width=32),
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.just(4))


@st.composite
def formats(draw):
    symmetric = draw(st.booleans())
    return Format(
        draw(st.integers(2, 8)),
        draw(st.sampled_from(GRANULARITIES)),
        symmetric,
        symmetric and draw(st.booleans()),
        group_size=draw(st.sampled_from([1, 2, 4])),
        observer=draw(st.sampled_from(OBSERVERS)),
    )


@st.composite
def tensors(draw):
    shape = draw(shapes)
    kind = draw(st.sampled_from(["any", "constant", "zeros"]))
    if kind == "any":
        return torch.from_numpy(draw(arrays("float32", shape, elements=floats)))
    return torch.full(shape, draw(floats) if kind == "constant" else 0.0)


def same(a, b):
    """Equal, and bit for bit (so that -0 and 0 differ)."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(max_examples=250, deadline=None)
@given(tensors(), formats(), st.integers(0, 2))
def test_fake_quantize_is_dequantize_of_quantize(x, format, axis):
    if format.granularity == "group":
        axis = 0
    grid = fit_grid(x, format, channel_axis=axis)
    expected = dequantize(quantize(x, grid), grid)
    assert torch.isfinite(expected).all()
    assert (grid.scale > 0).all()
    assert torch.isfinite(grid.scale).all()
    assert same(fake_quantize(x, grid), expected)
    tracked = x.clone().requires_grad_()
    assert same(fake_quantize(tracked, grid).detach(), expected)
    # Quantizing what is already on the grid changes nothing (at the ends of float32 the products round or clip).
    if grid.scale.min() > 1e-30 and grid.scale.max() < 1e30:
        assert same(quantize(expected, grid), quantize(x, grid))


@settings(max_examples=100, deadline=None)
@given(tensors(), formats())
def test_codes_and_values_equal_the_reference_twin(x, format):
    grid = fit_grid(x, format)
    expected, _ = reference.codes(x, grid)
    assert torch.equal(quantize(x, grid), expected)
    assert torch.equal(dequantize(expected, grid), reference.values(expected, grid))


@settings(max_examples=60, deadline=None)
@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(2, 8), st.sampled_from(["minmax", "percentile", "mse"]))
def test_a_constant_tensor_is_representable(value, bits, observer):
    x = torch.full((3, 4), value)
    for format in (Format(bits, symmetric=False, observer=observer), Format(bits, observer=observer)):
        y = fake_quantize(x, fit_grid(x, format))
        assert torch.allclose(y, x, rtol=1e-5, atol=1e-34)


def test_ties_round_to_even_and_codes_clip():
    grid = Grid(torch.tensor(2.0), torch.tensor(3.0), 0, 7)
    x = torch.tensor([-100.0, -1.0, 1.0, 3.0, 5.0, 7.0, 100.0])
    assert quantize(x, grid).tolist() == [0, 3, 3, 5, 5, 7, 7]
    assert fake_quantize(x, grid).tolist() == [-6, 0, 0, 4, 4, 8, 8]


def test_division_not_reciprocal():
    # Middles between two steps: a product with the rounded reciprocal falls on the other side of many of them.
    grid = Grid(torch.tensor(0.37), torch.tensor(0.0), -(2**15), 2**15 - 1)
    x = (torch.arange(2000) + 0.5) * grid.scale
    divided, multiplied = (x / grid.scale).round(), (x * (1 / grid.scale)).round()
    assert not torch.equal(divided, multiplied)
    assert torch.equal(quantize(x, grid), divided)


def test_half_integer_grid_has_four_even_levels_and_no_zero():
    grid = Grid(torch.tensor(2.0), torch.tensor(0.0), -2, 1, 0.5)
    x = torch.tensor([-9.0, -2.1, -1.9, -0.1, 0.1, 1.9, 2.1, 9.0])
    assert fake_quantize(x, grid).tolist() == [-3, -3, -1, -1, 1, 1, 3, 3]
    assert [end.item() for end in limits(grid)] == [-3, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_agrees_with_torch(bits, symmetric, per_channel):
    """torch multiplies by 1 / scale, so codes may differ by one where x / scale is within rounding of a tie."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(64, 500, generator=generator)
    format = Format(bits, "channel" if per_channel else "tensor", symmetric, observer="mse")
    grid = fit_grid(x, format)
    y, a, b = x.clone().requires_grad_(), format.qmin, format.qmax
    if per_channel:
        zero = grid.zero_point.flatten().int()
        theirs = torch.fake_quantize_per_channel_affine(y, grid.scale.flatten(), zero, 0, a, b)
    else:
        theirs = torch.fake_quantize_per_tensor_affine(y, grid.scale.item(), int(grid.zero_point), a, b)
    z = x.clone().requires_grad_()
    ours = fake_quantize(z, grid)
    steps = (x / grid.scale).double()
    tie = ((steps - steps.floor()) - 0.5).abs() <= 1e-6 * steps.abs().clamp(min=1)
    apart = ((ours - theirs).abs() / grid.scale).detach()
    assert tie.float().mean() < 0.01
    assert apart[~tie].max() < 1e-4
    assert apart.max() < 1.001
    weights = torch.randn(x.shape, generator=generator)
    ours.backward(weights)
    theirs.backward(weights)
    assert torch.equal(z.grad[~tie], y.grad[~tie])


@pytest.mark.parametrize("weight_format", [Format(4, "channel"), Format(2, "channel"), Format(8, "tensor")])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integer_arithmetic_gives_the_same_product(weight_format, bits):
    """int32 accumulation of (q_x - z) q_w, times both scales, is the matmul of the fake-quantized tensors."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 96, generator=generator) + 0.5, torch.randn(48, 96, generator=generator)
    gx, gw = fit_grid(x, Format(bits, symmetric=False)), fit_grid(w, weight_format)
    qx = (quantize(x, gx) - gx.zero_point).to(torch.int32)
    qw = quantize(w, gw).to(torch.int32)
    assert gx.zero_point > 0
    integers = (qx @ qw.T).double() * gx.scale.double() * gw.scale.flatten().double()
    simulated = (fake_quantize(x, gx) @ fake_quantize(w, gw).T).double()
    magnitude = fake_quantize(x, gx).abs().double() @ fake_quantize(w, gw).abs().double().T
    assert ((integers - simulated).abs() <= 1e-5 * magnitude + 1e-12).all()
    assert integers.abs().max() > 1


def test_half_integer_product_in_doubled_integers():
    """(2 q + 1) is an integer, so the half-integer grid also runs on integer arithmetic, at half the scale."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(32, 96, generator=generator), torch.randn(48, 96, generator=generator)
    gx, gw = fit_grid(x, Format(4, symmetric=False)), fit_grid(w, Format(2, "channel", half_integer=True))
    qx, qw = (quantize(x, gx) - gx.zero_point).to(torch.int32), (2 * quantize(w, gw) + 1).to(torch.int32)
    integers = (qx @ qw.T).double() * gx.scale.double() * gw.scale.flatten().double() / 2
    simulated = (fake_quantize(x, gx) @ fake_quantize(w, gw).T).double()
    assert torch.allclose(integers, simulated, atol=1e-4)


@pytest.mark.parametrize("format", [Format(3), Format(2, half_integer=True), Format(4, "token", symmetric=False)])
def test_gradient_equals_the_reference_twin(format):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 7, generator=generator)
    grid = fit_grid(x / 2, format)  # a grid narrower than the data, so that some of it clips
    x.requires_grad_()
    weights = torch.randn(x.shape, generator=generator)
    (gradient,) = torch.autograd.grad((fake_quantize(x, grid) * weights).sum(), x)
    _, inside = reference.codes(x.detach(), grid)
    assert 0 < (~inside).sum() < x.numel() / 2
    assert torch.equal(gradient, torch.where(inside, weights, 0.0))


def test_second_derivatives_and_functional_transforms():
    x, grid = torch.tensor([0.3, -0.7, 5.0], requires_grad=True), Grid(torch.tensor(0.25), torch.tensor(0.0), -4, 3)
    (first,) = torch.autograd.grad((fake_quantize(x, grid) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == [0.5, -1.5, 0.0]
    assert second.tolist() == [2.0, 2.0, 0.0]
    slopes = torch.func.vmap(torch.func.grad(lambda value: fake_quantize(value, grid) * 3))(x.detach())
    assert slopes.tolist() == [3.0, 3.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_in_is_dtype_out(dtype):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    grid = fit_grid(x, Format(4, "channel"))
    expected = dequantize(quantize(x.to(torch.promote_types(dtype, torch.float32)), grid), grid)
    for tracked in (False, True):
        y = x.clone().requires_grad_(tracked)
        assert torch.equal(fake_quantize(y, grid).detach(), expected.to(dtype))
        assert fake_quantize(y, grid).dtype == dtype
    fake_quantize(y, grid).sum().backward()
    assert y.grad.dtype == dtype
    assert set(y.grad.unique().tolist()) <= {0.0, 1.0}


def test_autocast_changes_nothing():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(x, Format(8, "channel"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fake_quantize(x.requires_grad_(), grid)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, fake_quantize(x, grid))


def test_limits_are_reached_by_far_values():
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    for format in (Format(3, "channel"), Format(3, "channel", symmetric=False), Format(2, half_integer=True)):
        grid = fit_grid(x, format)
        low, high = limits(grid)
        assert low.shape == grid.scale.shape
        assert (low < high).all()
        far = torch.full_like(x, 1e6)
        assert torch.equal(fake_quantize(far, grid), high.expand_as(x))
        assert torch.equal(fake_quantize(-far, grid), low.expand_as(x))


def test_empty_and_nan_pass_through_the_hot_path():
    grid = Grid(torch.tensor(1.0), torch.tensor(0.0), -4, 3)
    assert fake_quantize(torch.empty(0, 3), grid).shape == (0, 3)
    y = fake_quantize(torch.tensor([float("nan"), float("inf"), -float("inf")]), grid)
    assert y[0].isnan()
    assert y[1:].tolist() == [3.0, -4.0]
