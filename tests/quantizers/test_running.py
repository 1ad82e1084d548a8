import copy
from dataclasses import replace

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.quantizers import RunningRange, UniformQuantizer, fit_grid
from planish.scheme import OBSERVERS, Format


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMATS = [
    Format(4, symmetric=False),
    Format(4),
    Format(8, "token", symmetric=False),
    Format(4, "channel", symmetric=False),
]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
def test_one_batch_is_fit_grid(format, observer):
    x = normal(3, 5, 8)
    watcher = RunningRange(replace(format, observer=observer), channel_axis=1)
    assert watcher(x) is x
    grid, expected = watcher.grid(), fit_grid(x, replace(format, observer=observer), channel_axis=1)
    assert grid.scale.shape == expected.scale.shape
    assert torch.allclose(grid.scale, expected.scale)
    assert torch.equal(grid.zero_point, expected.zero_point)


def test_minmax_is_the_moving_average():
    watcher = RunningRange(Format(8, symmetric=False, observer="minmax"), momentum=0.75)
    low = high = None
    for seed in range(6):
        x = normal(50, seed=seed)
        watcher.observe(x)
        a, b = x.min().item(), x.max().item()
        low = a if low is None else 0.75 * low + 0.25 * a
        high = b if high is None else 0.75 * high + 0.25 * b
    assert watcher.grid().scale.item() == pytest.approx((high - low) / 255, rel=1e-5)


@pytest.mark.parametrize("observer", ["percentile", "mse", "mse2.4"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.describe())
def test_small_batches_together_are_one_tensor(format, observer):
    """While everything fits in the reservoir, the grid is that of all batches side by side."""
    format = replace(format, observer=observer)
    x = normal(12, 5, 8) * torch.linspace(0.5, 2, 12)[:, None, None]
    watcher = RunningRange(format, channel_axis=1)
    for batch in x.split(5):
        watcher.observe(batch)
    expected = fit_grid(x, format, channel_axis=1)
    assert torch.allclose(watcher.grid().scale, expected.scale, rtol=1e-5)
    assert torch.equal(watcher.grid().zero_point, expected.zero_point)


def test_reservoir_is_a_fair_sample_of_all_batches():
    watcher = RunningRange(Format(4, observer="mse"), capacity=3000)
    for number in range(6):
        watcher.observe(torch.full((40, 384), float(number + 1)))
    counts = [(watcher.sample == number + 1).sum().item() for number in range(6)]
    assert watcher.sample.numel() == 3000
    assert sum(counts) == 3000
    assert all(abs(count - 500) < 120 for count in counts)


def test_long_calibration_is_close_to_the_whole():
    batches = [normal(16, 50, 64, seed=seed) for seed in range(8)]
    format = Format(4, symmetric=False)
    watcher = RunningRange(format)
    for batch in batches:
        watcher.observe(batch)
    x = torch.cat(batches)
    errors = [(fake_quantize(x, grid) - x).square().mean() for grid in (watcher.grid(), fit_grid(x, format))]
    assert errors[0] < 1.01 * errors[1]
    assert watcher.most == x.max()
    assert watcher.least == x.min()


def test_determined_by_seed_and_order():
    def grid(seed):
        watcher = RunningRange(Format(8, symmetric=False, observer="percentile"), capacity=500, seed=seed)
        for number in range(4):
            watcher.observe(normal(1000, seed=number))
        return watcher.grid().scale.item()

    state = torch.get_rng_state()
    assert grid(1) == grid(1)
    assert grid(1) != grid(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_grid_goes_into_a_quantizer_and_batches_may_differ_in_size():
    format = Format(8, "token", symmetric=False)
    watcher, quantizer = RunningRange(format), UniformQuantizer(format)
    watcher.observe(normal(4, 5, 8))
    watcher.observe(normal(2, 5, 8, seed=1))
    quantizer.grid = watcher.grid()
    x = normal(7, 5, 8, seed=2)
    assert quantizer.scale.shape == (5, 1)
    assert (quantizer(x) - x).abs().median() < 0.02
    assert not watcher.state_dict()


def test_copies():
    watcher = RunningRange(Format(4))
    watcher.observe(normal(100))
    twin = copy.deepcopy(watcher)
    for one in (watcher, twin):
        one.observe(normal(100, seed=1))
    assert torch.equal(watcher.grid().scale, twin.grid().scale)


def test_refusals():
    with pytest.raises(PlanishError, match="group"):
        RunningRange(Format(4, "group"))
    with pytest.raises(PlanishError, match="momentum"):
        RunningRange(Format(4), momentum=1.0)
    watcher = RunningRange(Format(4, "token"))
    with pytest.raises(PlanishError, match="no batch"):
        watcher.grid()
    watcher.observe(normal(2, 5, 8))
    with pytest.raises(PlanishError, match="6 token rows, earlier batches had 5"):
        watcher.observe(normal(2, 6, 8))
    with pytest.raises(PlanishError, match="1 of 80 values"):
        watcher.observe(torch.cat([normal(2, 5, 8).flatten()[:-1], torch.tensor([float("nan")])]).view(2, 5, 8))
    assert watcher.batches == 1


def test_what_happens_to_a_batch_later_does_not_matter():
    x = normal(4, 5)
    watcher = RunningRange(Format(4, symmetric=False))
    watcher(x)
    expected = watcher.grid()
    x.zero_()
    assert torch.equal(watcher.grid().scale, expected.scale)
