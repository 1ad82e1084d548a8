import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flattening import WeightNoise
from planish.flattening.weight_noise import KINDS
from planish.functional import fake_quantize
from planish.network import assign, watch
from planish.scheme import Scheme
from planish.training import Ingredient, TaskLoss
from tests.training import tiny

W3 = replace(Scheme.parse("w3a4"), edge_bits=None)
STEADY = {"warmup": 0.0, "final_lr": 1.0, "weight_decay": 0.0, "clip_norm": None}


class Spied(WeightNoise):
    """Keeps what was added and the weights at which the gradient was taken."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.added, self.at = [], []

    def perturbation(self):
        self.added.append([d.clone() for d in super().perturbation()])
        return [d.clone() for d in self.added[-1]]

    def around(self, run, compute):
        def watched():
            self.at.append([p.detach().clone() for p in self.parameters])
            return compute()

        return super().around(run, watched)


class Sigma(Ingredient):
    """Sets the recorded deviation; to stand after the noise."""

    def __init__(self, noise, sigma):
        self.noise, self.sigma = noise, sigma

    def before_step(self, run, inputs, labels):
        for recorder in self.noise.recorders:
            recorder.variance = torch.full_like(recorder.variance, self.sigma**2)


class Gradients(Ingredient):
    """The gradient of every step; to stand first."""

    def __init__(self):
        self.seen = []

    def around(self, run, compute):
        loss = compute()
        self.seen.append([p.grad.clone() for p in run.model.parameters()])
        return loss


class Objective(Ingredient):
    def __init__(self, function):
        self.function = function

    def loss(self, run, inputs, labels, logits):
        return self.function(logits)


def one_input(model, steps, ingredients, function, lr):
    """Train on the input 1 with an objective of the outputs."""
    options = tiny.settings(epochs=1, lr=lr, **STEADY)
    tiny.fit(model, [*ingredients, Objective(function)], [torch.ones(1, 1)] * steps, task=False, run_settings=options)


def plan_of(model):
    return assign(watch(model, torch.ones(1, 1)), "w4a4")


# -- the increments P_t = d_t - d_(t-1) ------------------------------------------------------------------------------


def test_increments_telescope_and_anticorrelate():
    sigma, steps = 0.05, 30
    model = nn.Linear(1, 40_000, bias=False)
    noise = Spied(plan_of(model), "differential-forward", until=1.0)
    one_input(model, steps, [noise, Sigma(noise, sigma)], lambda y: y.sum() * 0, 0.0)
    increments = torch.stack([added[0].flatten() for added in noise.added]).double()
    first, last = increments[0], noise.previous[0].flatten().double()
    torch.testing.assert_close(increments[1:].sum(0), last - first, atol=1e-6, rtol=0)
    later = increments[1:]
    assert later.var() == pytest.approx(2 * sigma**2, rel=0.02)
    lag = [float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in itertools.pairwise(later)]
    assert sum(lag) / len(lag) == pytest.approx(-0.5, abs=0.01)
    far = [float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in zip(later[:-2], later[2:], strict=True)]
    assert sum(far) / len(far) == pytest.approx(0.0, abs=0.01)
    assert later.mean(0).abs().max() < 12 * sigma / steps  # (d_T - d_0) / T: it goes to zero with 1 / T
    assert first.var() == pytest.approx(sigma**2, rel=0.05)


@pytest.mark.parametrize("kind", ["differential", "differential-forward", "uniform", "iid"])
def test_noise_is_centred_though_the_recorded_error_is_not(kind):
    model = nn.Linear(1, 40_000, bias=False)
    noise = WeightNoise(plan_of(model), kind, until=1.0)

    class Biased(Ingredient):
        def before_step(self, run, inputs, labels):
            noise.recorders[0].mean = torch.full_like(noise.recorders[0].mean, 10.0)

    before = model.weight.detach().clone()
    one_input(model, 5, [noise, Biased()], lambda y: y.sum() * 0, 0.0)
    assert (model.weight - before).mean().abs() < 0.01


# -- the differential form is Anti-PGD -------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.02, 0.05])
def test_differential_equals_literal_anti_pgd(lr):
    """w <- w - lr g(w) + d_(t+1) - d_t with Nesterov momentum, w and d explicit; compared at z = w - d."""
    batches = [(x, y) for x, y in tiny.loader(shuffle=False)] * 5
    model, twin = tiny.mlp(), tiny.mlp()
    noise = Spied(tiny.plan(model, W3), "differential", until=1.0, refresh=7)
    tiny.fit(model, [noise], batches, run_settings=tiny.settings(epochs=1, lr=lr, **STEADY))
    assert len(noise.added) == len(batches)

    noisy = [twin[1].weight, twin[3].weight]
    velocity = dict.fromkeys(twin.parameters())
    with torch.no_grad():
        for w, d in zip(noisy, noise.added[0], strict=True):
            w += d
    for t, (images, labels) in enumerate(batches):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(images), labels).backward()
        with torch.no_grad():
            for p in twin.parameters():
                velocity[p] = p.grad.clone() if velocity[p] is None else 0.9 * velocity[p] + p.grad
                p -= lr * (p.grad + 0.9 * velocity[p])
            if t + 1 < len(batches):
                for w, new, old in zip(noisy, noise.added[t + 1], noise.added[t], strict=True):
                    w += new - old
    with torch.no_grad():
        for w, d in zip(noisy, noise.added[-1], strict=True):
            w -= d
    plain = tiny.mlp()
    tiny.fit(plain, [], batches, run_settings=tiny.settings(epochs=1, lr=lr, **STEADY))
    for mine, other, quiet in zip(model.parameters(), twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-6)
        assert not torch.allclose(mine, quiet, atol=1e-4)


# -- what the noise does to the objective ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "factor"), [("differential", 12), ("differential-forward", 24)])
def test_implicit_regularizer_of_the_fourth_power(kind, factor):
    w, sigma = 0.5, 0.05
    model = nn.Linear(1, 40_000, bias=False)
    nn.init.constant_(model.weight, w)
    noise, gradients = WeightNoise(plan_of(model), kind, until=1.0, refresh=1000), Gradients()
    one_input(model, 40, [gradients, noise, Sigma(noise, sigma)], lambda y: (y**4).sum(), 0.0)
    mean = torch.stack([g[0] for g in gradients.seen[1:]]).double().mean()  # the first increment is d_0 alone
    assert mean == pytest.approx(4 * w**3 + factor * w * sigma**2, abs=1.5e-3)


def valley(kind, steps=300):
    """L = 1/2 v^2 |u|^2 from u near 0, v = 1; returns v, |u|^2 and the trace of the Hessian N v^2 + |u|^2."""
    n = 100
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, n, bias=False))
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[1].weight, 1e-3)
    noise = WeightNoise(plan_of(model), kind, until=1.0, refresh=10_000, seed=1)
    one_input(model, steps, [noise, Sigma(noise, 0.05)], lambda y: 0.5 * (y**2).sum(), 0.005)
    v, u = float(model[0].weight.detach()), float((model[1].weight.detach() ** 2).sum())
    return v, u, n * v**2 + u


def test_only_differential_noise_goes_down_the_widening_valley():
    results = {kind: valley(kind) for kind in ("none", "differential", "iid")}
    assert results["none"][2] > 99.9  # gradient descent stalls where it fell in
    assert results["differential"][2] < 20
    assert results["differential"][1] < 0.1  # and it stays in the valley's bottom
    assert results["iid"][1] > 5  # drifts away from the bottom
    assert results["iid"][2] > 2 * results["differential"][2]


# -- the kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.conv, tiny.vit])
def test_gain_zero_is_plain_training_bit_for_bit(kind, make):
    size = 16 if make is tiny.vit else 8
    model, plain = make(), make()
    noise = WeightNoise(tiny.plan(model, W3, size), kind, gain=0.0)
    tiny.fit(model, [noise], tiny.loader(size=size))
    tiny.fit(plain, [], tiny.loader(size=size))
    assert len(noise.parameters) == (3 if make is tiny.conv else 10)
    assert tiny.same(model, plain)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("none", "iid")])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_restored_bit_for_bit(kind, fails):
    class Fails(Ingredient):
        def loss(self, run, inputs, labels, logits):
            if fails and run.step == 2:
                raise RuntimeError("here")

    model = tiny.conv()
    noise = Spied(tiny.plan(model, W3), kind, clip=True)
    options = tiny.settings(lr=0.0, epochs=1)
    if fails:
        with pytest.raises(RuntimeError, match="here"):
            tiny.fit(model, [noise, Fails()], run_settings=options)
    else:
        tiny.fit(model, [noise, Fails()], run_settings=options)
    for a, b in zip(model.parameters(), tiny.conv().parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(noise.at) == (3 if fails else 6)
    assert not torch.equal(noise.at[0][0], model[0].weight)


def wide(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.ReLU(), nn.Linear(2000, 4))
    noise = Spied(tiny.plan(model, W3), **options)
    clean = model[1].weight.detach().clone()
    tiny.fit(model, [noise], run_settings=tiny.settings(lr=0.0, epochs=1))
    return noise, clean, noise.at[0][0], noise.recorders[0]


@pytest.mark.parametrize("part", [0.1, 0.5, 1.0])
def test_residual_rounds_a_part_and_leaves_the_rest(part):
    noise, clean, used, recorder = wide(kind="residual", part=part)
    rounded = fake_quantize(clean, recorder.grid)
    changed = used != clean
    assert changed.float().mean() == pytest.approx(part, abs=0.005)
    torch.testing.assert_close(used[changed], rounded[changed], atol=1e-7, rtol=1e-6)
    others = noise.at[1][0] != clean
    assert (changed & others).float().mean() == pytest.approx(part**2, abs=0.01)  # a new part at every step


def test_residual_after_clipping_still_lands_on_the_grid():
    _, clean, used, recorder = wide(kind="residual", part=1.0, clip=True)
    torch.testing.assert_close(used, fake_quantize(clean, recorder.grid), atol=1e-7, rtol=1e-6)
    low, high = recorder.limits()
    assert ((clean < low) | (clean > high)).any()


@pytest.mark.parametrize("kind", ["none", "uniform"])
def test_clipping_alone_and_with_noise(kind):
    _, clean, used, recorder = wide(kind=kind, clip=True)
    low, high = recorder.limits()
    middle = clean.clamp(low, high)
    assert not torch.equal(middle, clean)
    if kind == "none":
        assert torch.equal(used, middle)
    else:
        assert ((used - middle).abs() <= recorder.step * 0.5001).all()
        assert ((used - middle) / recorder.step).var() == pytest.approx(1 / 12, rel=0.02)


def test_noise_has_the_recorded_deviation_of_each_channel():
    _, clean, used, recorder = wide(kind="differential", gain=2.0)
    ratio = (used - clean) / recorder.deviation
    assert ratio.std() == pytest.approx(2.0, rel=0.01)
    assert recorder.deviation.shape == (2000, 1)
    error = fake_quantize(clean, recorder.grid) - clean
    torch.testing.assert_close(recorder.variance[:, 0], error.var(1, correction=0), rtol=1e-4, atol=1e-8)


def test_iid_stays_in_the_weights_until_it_is_off():
    model = tiny.mlp()
    noise = WeightNoise(tiny.plan(model, W3), "iid", until=0.5)
    seen = []

    class Look(Ingredient):
        def after_step(self, run):
            seen.append(model[1].weight.detach().clone())

    tiny.fit(model, [noise, Look()], run_settings=tiny.settings(lr=0.0, epochs=1))
    moved = [not torch.equal(a, b) for a, b in zip([tiny.mlp()[1].weight, *seen], seen, strict=False)]
    assert moved == [True, True, True, False, False, False]


def test_noise_is_on_between_start_and_until():
    model = tiny.mlp()
    noise = Spied(tiny.plan(model), "differential", start=0.25, until=0.75)
    tiny.fit(model, [noise])
    clean = [torch.equal(a[0], b) for a, b in zip(noise.at, [tiny.mlp()[1].weight] * 12, strict=False)]
    assert len(noise.added) == 6
    assert clean[0]


def test_state_round_trip():
    model = tiny.mlp()
    noise = WeightNoise(tiny.plan(model), "differential-forward")
    tiny.fit(model, [noise])
    saved = copy.deepcopy(noise.state_dict())
    other = WeightNoise(tiny.plan(model), "differential-forward")
    tiny.fit(copy.deepcopy(model), [other], run_settings=tiny.settings(epochs=0))
    other.level.parameters = noise.parameters
    other.load_state_dict(saved)
    noise.pool.renew(20)
    other.pool.renew(20)
    for a, b in zip(noise.perturbation(), other.perturbation(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"kind": "laplace"}, {"part": 0.0}, {"part": 1.5}])
def test_options_are_checked(options):
    with pytest.raises(PlanishError):
        WeightNoise(tiny.plan(tiny.mlp()), **options)


def test_weights_alone_are_perturbed():
    """Biases and norms have no grid and get no noise."""
    model = tiny.conv()
    noise = WeightNoise(tiny.plan(model), "iid", until=1.0)
    tiny.fit(model, [noise, TaskLoss(0.0)], task=False, run_settings=tiny.settings(lr=0.0))
    fresh = dict(tiny.conv().named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])}
    assert changed == {"0.weight", "4.weight", "9.weight"}
