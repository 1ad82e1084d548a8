import copy
from itertools import pairwise

import pytest
import torch

from planish.flattening.recorders import CANDIDATES, SAMPLE, ErrorRecorder, part_of_sample, sample_activation
from planish.functional import fake_quantize
from planish.quantizers import fit_grid
from planish.quantizers.ranges import SMALLEST
from planish.scheme import Format

torch.set_num_threads(1)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 0.98), (3, 1.0), (4, 1.0), (8, 1.0)])
def test_error_of_gaussian_weights_is_that_of_uniform_rounding(bits, ratio):
    torch.manual_seed(0)
    recorder = ErrorRecorder(Format(bits, "channel", symmetric=False, observer="minmax"), channel_axis=0)
    recorder.measure(torch.randn(1024, 1000))
    share = recorder.variance / (recorder.step**2 / 12)
    assert recorder.variance.shape == recorder.mean.shape == (1024, 1)
    assert share.mean() == pytest.approx(ratio, abs=0.02)
    assert (recorder.mean / recorder.step).mean().abs() < 0.003


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("nonzero_only", [False, True])
def test_error_of_relu_outputs_is_made_by_the_nonzeros(bits, nonzero_only):
    torch.manual_seed(0)
    x = torch.randn(100, 2_000).relu()
    recorder = ErrorRecorder(Format(bits, symmetric=False, observer="minmax"), nonzero_only=nonzero_only)
    recorder.measure(x)
    share = float(recorder.variance / (recorder.step**2 / 12))
    assert recorder.nonzero == pytest.approx(0.5, abs=0.01)
    assert share == pytest.approx(1.0 if nonzero_only else 0.5, abs=0.05 if bits == 3 else 0.02)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "group"])
def test_first_measure_is_the_plain_moment(granularity):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32)
    form = Format(4, granularity, observer="minmax", symmetric=granularity != "token")
    recorder = ErrorRecorder(form, channel_axis=0)
    recorder.measure(x)
    error = fake_quantize(x, fit_grid(x, form)) - x
    over = {"tensor": (0, 1, 2), "channel": (1, 2), "group": (1, 2), "token": (0, 2)}[granularity]
    expected = error.var(over, correction=0).reshape(-1)
    torch.testing.assert_close(recorder.variance.reshape(-1), expected, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(recorder.mean.reshape(-1), error.mean(over).reshape(-1), atol=1e-7, rtol=1e-5)
    torch.broadcast_shapes(recorder.deviation.shape, x.shape)


def test_moving_average_in_closed_form():
    torch.manual_seed(0)
    beta, x = 0.8, torch.randn(4, 4_000)
    recorder = ErrorRecorder(Format(8, "channel", observer="minmax"), channel_axis=0, beta=beta)
    recorder.measure(x)
    first = recorder.variance.clone()
    for _ in range(5):
        recorder._follow = lambda x, grid: grid  # the range stays, so that each measure sees the same error
        recorder.measure(x * 0.5)
    error = fake_quantize(x * 0.5, recorder.grid) - x * 0.5
    later = error.var(1, correction=0, keepdim=True)
    expected = beta**5 * first + (1 - beta**5) * later
    assert not torch.allclose(first, later, rtol=1e-4)
    torch.testing.assert_close(recorder.variance, expected, rtol=1e-5, atol=0)


def settle(recorder, draws):
    scales = []
    for x in draws:
        recorder.measure(x)
        scales.append(float(recorder.step.mean()))
    return scales


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_range_follows_a_tensor_whose_scale_doubles(granularity):
    torch.manual_seed(0)
    form = Format(4, granularity)
    recorder = ErrorRecorder(form, channel_axis=0)
    settle(recorder, [torch.randn(4, 4_000) for _ in range(5)])
    settle(recorder, [2 * torch.randn(4, 4_000) for _ in range(12)])  # abruptly
    best = fit_grid(2 * torch.randn(4, 50_000), form).scale
    assert recorder.step.mean() == pytest.approx(float(best.mean()), rel=0.1)
    scales = settle(recorder, [(2 + 0.01 * t) * torch.randn(4, 4_000) for t in range(200)])  # slowly
    assert scales[-1] / scales[0] == pytest.approx(2, rel=0.12)
    settle(recorder, [torch.randn(4, 4_000) for _ in range(200)])  # and back
    assert recorder.step.mean() == pytest.approx(float(best.mean()) / 2, rel=0.1)


def test_range_stays_where_it_is_best():
    torch.manual_seed(0)
    recorder = ErrorRecorder(Format(4))
    scales = settle(recorder, [torch.randn(16_000) for _ in range(60)])
    assert max(scales) / min(scales) < 1.08


@pytest.mark.parametrize("counts", [(8,), (4, 4), (3, 2, 2, 1), (1, 0, 5)])
@pytest.mark.parametrize("windows", [1, 4])
def test_the_parts_of_a_sample_are_those_of_the_whole_batch(counts, windows):
    whole = torch.arange(sum(counts) * windows * 3000.0).view(-1, 3000)
    ends = [windows * sum(counts[:rank]) for rank in range(len(counts) + 1)]
    parts = [
        # a process without images computes one that does not count
        part_of_sample(whole[start:stop] if stop > start else whole[:windows], counts, rank)
        for rank, (start, stop) in enumerate(pairwise(ends))
    ]
    assert torch.equal(torch.cat(parts), sample_activation(whole).flatten())


def test_a_first_dimension_that_is_not_of_images_has_a_sample_too():
    assert len(part_of_sample(torch.randn(5, 8, 3), (8, 8), 0)) == 5 * 8 * 3


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 30)])
@pytest.mark.parametrize(("granularity", "axis"), [("tensor", None), ("channel", 0), ("channel", 1), ("token", None)])
def test_the_range_goes_halfway_to_the_best_candidate_tried_together_or_alone(shape, granularity, axis, monkeypatch):
    """Against the candidates one by one."""
    torch.manual_seed(0)
    x, scales = torch.randn(shape), []
    own = {"tensor": set(), "channel": {axis}, "token": {len(shape) - 2}}[granularity]  # dimensions that have scales
    recorder = ErrorRecorder(Format(3, granularity), channel_axis=axis)
    recorder.measure(x)
    grid = recorder.grid._replace(scale=recorder.step * (0.8 + 0.1 * torch.rand_like(recorder.step)))
    for together in (1 << 20, 0):
        monkeypatch.setattr("planish.flattening.recorders.TOGETHER", together)
        scales.append(recorder._follow(x, grid).scale)
    least, best = torch.full(grid.scale.shape, torch.inf), grid.scale
    for factor in CANDIDATES:
        tried = grid._replace(scale=grid.scale * factor)
        error = (fake_quantize(x, tried) - x).square().sum([d for d in range(x.dim()) if d not in own])
        error = error.reshape(least.shape)
        least, best = torch.minimum(error, least), torch.where(error < least, tried.scale, best)
    assert torch.equal(*scales)
    torch.testing.assert_close(scales[0], (grid.scale + best) / 2)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-30])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("nonzero_only", [False, True])
def test_constant_tensors_make_no_nan(value, granularity, nonzero_only):
    recorder = ErrorRecorder(Format(4, granularity), channel_axis=0, nonzero_only=nonzero_only)
    x = torch.full((2, 10), value)
    for _ in range(1500):
        recorder.measure(x)
        if value:
            break
    for number in (recorder.mean, recorder.variance, recorder.deviation, recorder.step, *recorder.limits()):
        assert torch.isfinite(number).all()
    assert (recorder.step >= SMALLEST).all()
    assert torch.isfinite(fake_quantize(x, recorder.grid)).all()
    if value == 0:
        assert recorder.variance.abs().max() == 0
        recorder.measure(torch.randn(2, 10))  # it comes to life: the range is found anew
        assert recorder.step.min() > 0.01


def test_state_round_trip():
    torch.manual_seed(0)
    x = torch.randn(4, 100)
    recorder = ErrorRecorder(Format(4, "channel"), channel_axis=0)
    fresh = copy.deepcopy(recorder)
    fresh.load_state_dict(recorder.state_dict())
    assert fresh.grid is None
    recorder.measure(x)
    recorder.measure(1.1 * x)
    fresh.load_state_dict(recorder.state_dict(), "cpu")
    for r in (recorder, fresh):
        r.measure(1.3 * x)
    for key, value in recorder.state_dict().items():
        other = fresh.state_dict()[key]
        pairs = zip(value, other, strict=True) if key == "grid" else [(torch.as_tensor(value), torch.as_tensor(other))]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_sample_takes_whole_images_spread_over_the_batch():
    x = torch.arange(64.0).reshape(64, 1, 1).expand(64, 8, 64)
    sample = sample_activation(x, most=8 * 512)
    assert sample.shape == (8, 8, 64)
    assert sample[:, 0, 0].tolist() == [0, 8, 16, 24, 32, 40, 48, 56]
    assert sample_activation(x, most=10).shape[0] == 1
    assert sample_activation(x).shape[0] == SAMPLE // 512
    assert sample_activation(x[:3]).shape[0] == 3
