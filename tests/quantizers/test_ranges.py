import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.errors import PlanishError
from planish.functional import fake_quantize, limits
from planish.quantizers import fit_grid
from planish.quantizers.ranges import SAMPLE, grid_of_range, row_errors, subsample
from planish.scheme import OBSERVERS, Format
from tests.quantizers import reference

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compact(grid, format, shape):
    """The scales of a grid, one a shared range, in order (a group-wise grid repeats each of them)."""
    scale, zero = (part.expand(shape).reshape(-1) if part.numel() > 1 else part.reshape(-1) for part in grid[:2])
    step = format.group_size if format.granularity == "group" else 1
    return scale[::step], zero[::step]


FORMATS = [
    Format(4),
    Format(3, symmetric=False),
    Format(2, half_integer=True),
    Format(4, "channel"),
    Format(2, "channel", half_integer=True),
    Format(8, "channel", symmetric=False),
    Format(4, "group", group_size=6),
    Format(4, "group", symmetric=False, group_size=3),
    Format(5, "token", symmetric=False),
    Format(4, "token"),
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
@pytest.mark.parametrize("channel_axis", [0, 1, -1])
def test_minmax_equals_the_reference_twin(format, channel_axis):
    x = normal(6, 12, 18)
    grid = fit_grid(x, replace(format, observer="minmax"), channel_axis=channel_axis)
    lists = reference.groups(x, format, channel_axis)
    torch.broadcast_to(grid.scale, x.shape)
    moved = x.movedim(channel_axis, 0).shape
    if format.granularity == "group":
        assert grid.scale.shape == grid.zero_point.shape == x.shape
        scale = grid.scale.movedim(channel_axis, 0).reshape(-1)[:: format.group_size]
        zero = grid.zero_point.movedim(channel_axis, 0).reshape(-1)[:: format.group_size]
    else:
        scale, zero = grid.scale.flatten(), grid.zero_point.flatten()
        expected = {
            "tensor": (),
            "token": (12, 1),
            "channel": tuple(moved[0] if d == channel_axis % 3 else 1 for d in range(3)),
        }
        assert grid.scale.shape == expected[format.granularity]
    pairs = [reference.minmax(numbers, format) for numbers in lists]
    assert torch.allclose(scale.double(), torch.tensor([s for s, _ in pairs], dtype=torch.double), rtol=1e-6)
    assert zero.tolist() == [z for _, z in pairs]


@pytest.mark.parametrize("observer", ["mse", "mse2.4"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
def test_mse_search_is_near_the_best_clip(observer, format):
    """A dense search over clips, in Python floats, finds hardly less error than the fitted grid leaves."""
    power = 2.4 if observer == "mse2.4" else 2.0
    x = normal(4, 6, 12, seed=3)
    x = torch.where(x.abs() > 1.5, 2 * x, x)  # heavier tails
    format = replace(format, observer=observer)
    grid = fit_grid(x, format)
    left = (fake_quantize(x, grid).double() - x.double()).abs() ** power
    best = plain = 0.0
    for numbers in reference.groups(x, format):
        largest = max(abs(number) for number in numbers)
        errors = []
        for i in range(200):
            cut = largest * (1 - i / 200)
            ends = [min(max(number, -cut), cut) for number in (min(numbers), max(numbers))]
            errors.append(reference.error(numbers, *reference.minmax(ends, format), format, power))
        best, plain = best + min(errors), plain + errors[0]
    assert left.sum().item() <= 1.02 * best
    assert left.sum().item() <= plain * 1.0001


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8),
    st.integers(2, 8),
    st.sampled_from([(True, False), (True, True), (False, False)]),
    st.sampled_from([2.0, 2.4]),
)
def test_row_errors_equal_the_reference_twin(numbers, bits, kind, power):
    format = Format(bits, symmetric=kind[0], half_integer=kind[1])
    values = torch.tensor([numbers])
    scale, zero = grid_of_range(torch.tensor([-3.0]), torch.tensor([2.0]), format)
    got = row_errors(values, scale, zero, format, power, torch.empty_like(values)).item()
    expected = reference.error(numbers, scale.item(), int(zero), format, power)
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("bits", "half", "distortion"), [(2, True, 0.1188), (3, True, 0.03744), (4, True, 0.01154)])
def test_gaussian_distortion_matches_max_1960(bits, half, distortion):
    """Least mean squared error of a uniform quantizer of a unit Gaussian (Max 1960, IRE Trans. IT-6, table II)."""
    x = normal(60_000)
    error = (fake_quantize(x, fit_grid(x, Format(bits, half_integer=half))) - x).square().mean().item()
    assert error == pytest.approx(distortion, rel=0.02)


def test_percentile_cuts_outliers_and_interpolates():
    x = torch.arange(1, 1002, dtype=torch.float32)
    x[-1] = 1e6
    format = Format(8, symmetric=False, observer="percentile")
    # 1001 values: the 0.999 quantile is the value at place 999 exactly, which is 1000.
    assert fit_grid(x, format).scale.item() == pytest.approx(1000 / 255)
    y = normal(5, 400)
    grid = fit_grid(y, Format(8, "channel", symmetric=False, observer="percentile"))
    ends = torch.quantile(y, torch.tensor([0.001, 0.999]), dim=1)
    assert torch.allclose(grid.scale.flatten(), (ends[1] - ends[0]) / 255, rtol=1e-5)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_signed_data_puts_zero_at_the_end(bits, observer):
    x = normal(1000).abs()
    format = Format(bits, symmetric=False, observer=observer)
    assert fit_grid(x, format).zero_point.item() == 0
    assert fit_grid(-x, format).zero_point.item() == 2**bits - 1
    assert fit_grid(x + 5, format).zero_point.item() == 0
    zero = fit_grid(normal(1000), format).zero_point.item()
    assert 0 < zero < 2**bits - 1
    assert zero == int(zero)


def test_gelu_keeps_its_short_tail():
    """One clip for both ends: the short negative tail survives while the long positive one is cut."""
    x = torch.nn.functional.gelu(normal(20_000) * 3)
    search, span = (fit_grid(x, Format(6, symmetric=False, observer=o)) for o in ("mse", "minmax"))
    assert search.scale < span.scale
    assert (search.scale * search.zero_point).item() == pytest.approx(0.17, abs=0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
def test_degenerate_values_give_positive_finite_scales(format, observer):
    format = replace(format, observer=observer)
    shape = (2, 3, 18)
    mixed = normal(*shape)
    mixed[0], mixed[1, 0], mixed[1, 1] = 0.0, 3e38, -1e-45
    for x in (torch.zeros(shape), torch.full(shape, 1e-45), torch.full(shape, -3.4e38), mixed, mixed * 1e-30):
        grid = fit_grid(x, format)
        y = fake_quantize(x, grid)
        assert torch.isfinite(grid.scale).all()
        assert (grid.scale > 0).all()
        assert torch.isfinite(y).all()
    assert fake_quantize(torch.zeros(shape), fit_grid(torch.zeros(shape), format)).abs().max() < 1e-30


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_is_finite_at_the_end_of_float32(bits, symmetric):
    x = torch.tensor([-3.4e38, 3.4e38])
    low, high = limits(fit_grid(x, Format(bits, symmetric=symmetric, observer="minmax")))
    assert torch.isfinite(low)
    assert torch.isfinite(high)
    assert 2e38 < high - low < float("inf")


def test_scale_does_not_depend_on_units():
    x, format = normal(8, 64), Format(4, "channel")
    for unit in (2.0**-80, 2.0**60):
        assert torch.equal(fit_grid(x * unit, format).scale, fit_grid(x, format).scale * unit)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_non_finite_values_are_counted(observer):
    x = torch.zeros(4, 6)
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(PlanishError, match="3 of 24 values are not finite"):
        fit_grid(x, Format(4, "channel", observer=observer))


@pytest.mark.parametrize(
    ("x", "format", "axis", "words"),
    [
        (torch.ones(4, 10), Format(4, "group", group_size=4), 0, ["10 inputs", r"\(4, 10\)", "groups of 4"]),
        (torch.ones(5), Format(4, "token"), 0, ["token", r"\(5,\)"]),
        (torch.ones(5, 2), Format(4, "channel"), 2, ["channel_axis 2", r"\(5, 2\)"]),
        (torch.ones(0, 2), Format(4), 0, ["empty", r"\(0, 2\)"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, format, axis, words):
    for word in words:
        with pytest.raises(PlanishError, match=word):
            fit_grid(x, format, channel_axis=axis)


def test_subsample_sees_every_feature_and_fits_the_limit():
    x = torch.arange(384).float().repeat(1, 1000)  # (1, 384000): a fixed stride of 6 would see 64 features
    sample = subsample(x, SAMPLE)
    assert sample.numel() <= SAMPLE
    assert sample.unique().numel() == 384
    assert subsample(x, 10**6) is x
    few = subsample(normal(3, 10_000), 300)
    assert few.shape[0] == 3
    assert 150 < few.numel() <= 300


def test_fit_leaves_its_input_alone_and_takes_parameters():
    weight = torch.nn.Parameter(normal(4, 6))
    before = weight.detach().clone()
    grid = fit_grid(weight, Format(4, "channel"))
    assert torch.equal(weight, before)
    assert not grid.scale.requires_grad
    half = fit_grid(weight.bfloat16(), Format(4, "channel"))
    assert half.scale.dtype == torch.float32
    assert torch.allclose(half.scale, grid.scale, rtol=0.1)


def test_fit_is_fast():
    """Generous against a shared machine: about 5 ms are usual for each on one core."""
    weight, activation = normal(64, 64, 3, 3), normal(200_000)
    for x, format, most in ((weight, Format(4, "channel"), 0.1), (activation, Format(4, symmetric=False), 0.4)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            fit_grid(x, format)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < most
