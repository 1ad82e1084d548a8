import copy
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flattening import ActivationNoise, pool
from planish.functional import fake_quantize
from planish.network import assign, taps_of, watch
from planish.scheme import Scheme
from planish.training import Ingredient
from tests.training import tiny

W4A4 = replace(Scheme.parse("w4a4"), edge_bits=None)


class Taken(Ingredient):
    """Keeps the tap of the last layer, and what it makes of a given input in a given step."""

    def __init__(self, noise, x, step=0, kept=None):
        self.noise, self.x, self.step, self.out = noise, x, step, None

    def after_step(self, run):
        if run.step == self.step:
            self.tap = list(self.noise.taps.values())[-1]
            self.x.requires_grad_()
            self.out = self.tap(self.x)
            if self.out.requires_grad:
                (self.gradient,) = torch.autograd.grad(self.out.sum(), self.x)
            self.out = self.out.detach()
            self.numbers = (self.tap.level.low, self.tap.level.high, self.tap.level.sigma)


def tapped(x, step=0, **options):
    """One layer of x.shape[-1] inputs trained on x; the tap's output for x after one step."""
    torch.manual_seed(0)
    model = nn.Linear(x.shape[-1], 4)
    noise = ActivationNoise(assign(watch(model, x[:1]), W4A4), until=0.5, **options)
    taken = Taken(noise, x.clone(), step)
    batches = [(x, torch.zeros(len(x), dtype=torch.long))] * 4
    tiny.fit(model, [noise, taken], batches, run_settings=tiny.settings(epochs=1, lr=0.0))
    assert type(model) is nn.Linear
    assert list(taps_of(model)) == []
    return taken


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("signed", [True, False])
def test_recorded_variance_is_what_is_added(gain, signed):
    torch.manual_seed(1)
    x = torch.randn(256, 256) if signed else torch.randn(256, 256).relu()
    taken = tapped(x, gain=gain)
    low, high, sigma = taken.numbers
    present = x != 0
    error = (fake_quantize(x, taken.tap.recorder.grid) - x)[present]
    added = (taken.out - x.clamp(low, high))[present]
    assert added.std() == pytest.approx(sigma, rel=0.01)
    assert added.mean().abs() < 0.02 * sigma
    # recorded on a sample of the batch
    assert sigma == pytest.approx(gain * float(error.std()), rel=0.03)
    p = scipy.stats.kstest(added[:20_000].numpy() / sigma, "norm").pvalue
    assert p > 1e-3


def test_zeros_stay_zero():
    torch.manual_seed(1)
    x = torch.randn(64, 256).relu()
    zero = x == 0
    assert (tapped(x).out[zero] == 0).all()
    assert (tapped(x, nonzero_only=False).out[zero] != 0).float().mean() > 0.99


def test_values_lie_in_the_range_before_the_noise():
    torch.manual_seed(1)
    x = torch.randn(256, 64) ** 3  # long tails, so that the range cuts
    taken = tapped(x, kind="none")
    low, high, _ = taken.numbers
    assert torch.equal(taken.out, x.clamp(low, high))
    outside = (x < low) | (x > high)
    assert 0 < outside.float().mean() < 0.2
    assert (taken.gradient[outside] == 0).all()
    assert (taken.gradient[~outside] == 1).all()
    noisy = tapped(x)
    assert (noisy.gradient[outside] == 0).all()
    assert (noisy.gradient[~outside] == 1).all()
    free = tapped(x, clip=False)
    assert (free.out - x).std() == pytest.approx(free.numbers[2], rel=0.02)
    assert (free.gradient == 1).all()


def test_uniform_law_has_the_width_of_a_step():
    torch.manual_seed(1)
    x = torch.randn(256, 256)
    taken = tapped(x, kind="uniform", clip=False)
    added = (taken.out - x) / taken.tap.recorder.step
    assert added.abs().max() <= 0.5001
    assert scipy.stats.kstest(added.flatten()[:20_000].numpy(), scipy.stats.uniform(-0.5, 1).cdf).pvalue > 1e-3


def test_residual_is_the_quantizer_for_a_part_of_the_layers():
    torch.manual_seed(1)
    x = torch.randn(256, 64)
    taken = tapped(x, kind="residual", part=1.0)
    grid = taken.tap.recorder.grid
    # fused kernels multiply by the reciprocal of the scale: a value next to a tie may go the other way
    same = torch.isclose(taken.out, fake_quantize(x, grid), atol=1e-6, rtol=1e-5)
    assert same.float().mean() > 0.9999
    low, high, _ = taken.numbers
    assert (taken.gradient[(x < low - grid.scale) | (x > high + grid.scale)] == 0).all()
    assert (taken.gradient[(x > low) & (x < high)] == 1).all()


def test_off_after_until_and_in_evaluation_mode():
    x = torch.randn(8, 64)
    assert not torch.equal(tapped(x, step=1).out, x)
    assert torch.equal(tapped(x, step=2).out, x)
    model = tiny.conv()
    noise = ActivationNoise(tiny.plan(model), until=1.0)
    plain = tiny.conv().eval()
    seen = []

    class Look(Ingredient):
        def after_step(self, run):
            model.eval()
            plain.load_state_dict(model.state_dict())
            seen.append(torch.equal(model(torch.ones(2, 1, 8, 8)), plain(torch.ones(2, 1, 8, 8))))
            model.train()

    tiny.fit(model, [noise, Look()])
    assert seen == [True] * 12


@pytest.mark.parametrize("relu", [False, True])
def test_bfloat16_inputs(relu):
    x = torch.randn(16, 64)
    x = x.relu() if relu else x
    tap = tapped(x).tap
    tap.owner.taps["x"] = tap
    for kind in ("gaussian", "residual", "none"):
        tap.owner.kind, tap.on, tap.measuring = kind, True, True
        out = tap.train()(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert out.shape == x.shape
        assert (out - x.clamp(tap.level.low, tap.level.high)).abs().max() < 8 * tap.level.sigma + tap.level.high / 64
        assert torch.isfinite(out).all()


def test_long_batches_share_noise_between_groups(monkeypatch):
    monkeypatch.setattr(pool, "LIMIT", 16 * 64)
    x = torch.randn(64, 64)
    taken = tapped(x, clip=False)
    added = (taken.out - x).view(4, 16, 64)
    torch.testing.assert_close(added[0], added[3], atol=1e-6, rtol=0)
    assert added[0].std() == pytest.approx(taken.numbers[2], rel=0.1)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("make", [tiny.conv, tiny.vit])
def test_taps_are_gone_afterwards(make, raises):
    class Fails(Ingredient):
        def after_step(self, run):
            if raises:
                raise RuntimeError("here")

    size = 16 if make is tiny.vit else 8
    model, fresh = make(), make()
    noise = ActivationNoise(tiny.plan(model, W4A4, size))
    counted = []

    class Count(Ingredient):
        def after_step(self, run):
            counted.append(len(noise.taps))

    try:
        tiny.fit(model, [noise, Count(), Fails()], tiny.loader(size=size))
    except RuntimeError:
        assert raises
    # inputs of the layers and, in each of two blocks, q, k, probabilities and v
    assert counted[0] == (3 if make is tiny.conv else 10 + 2 * 4)
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    copy.deepcopy(model)


def test_gain_zero_is_plain_training_bit_for_bit():
    model, plain = tiny.conv(), tiny.conv()
    tiny.fit(model, [ActivationNoise(tiny.plan(model), gain=0.0, clip=False)])
    tiny.fit(plain)
    assert tiny.same(model, plain)


def test_error_is_measured_every_so_many_steps():
    model = tiny.mlp()
    noise = ActivationNoise(tiny.plan(model), refresh=4, until=1.0)
    times = []

    class Count(Ingredient):
        def before_step(self, run, inputs, labels):
            times.append(all(tap.measuring for tap in noise.taps.values()))

        def after_step(self, run):
            assert not any(tap.measuring for tap in noise.taps.values())  # once a step

    tiny.fit(model, [noise, Count()])
    assert [i for i, measured in enumerate(times) if measured] == [0, 4, 8]


def test_probabilities_are_measured_where_they_are_rounded():
    """Measuring them elsewhere would take the fused kernel away from a step that could keep it."""
    model = tiny.vit()
    noise = ActivationNoise(tiny.plan(model, size=16), "residual", part=1.0, refresh=3, until=1.0)
    seen = []

    class Watch(Ingredient):
        def before_step(self, run, inputs, labels):
            seen.extend(
                (run.step, tap.measuring, tap.chosen)
                for tap in noise.taps.values()
                if tap.inner and tap.recorder.grid is not None
            )

    tiny.fit(model, [noise, Watch()], tiny.loader(size=16))
    assert any(measured for _, measured, _ in seen)
    assert all(chosen for _, measured, chosen in seen if measured)


def test_kind_is_checked():
    with pytest.raises(PlanishError, match="gaussian"):
        ActivationNoise(tiny.plan(tiny.mlp()), "cauchy")
