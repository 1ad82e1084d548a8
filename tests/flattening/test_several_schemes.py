"""Flattening for several schemes at once, and the two shortcuts of the hot path: in-place rounding and idle taps."""

import copy

import pytest
import torch

from planish.errors import PlanishError
from planish.flattening import ActivationNoise, FlattenSettings, WeightNoise, flatten
from planish.flattening.activation_noise import _Rounding
from planish.functional import Grid, fake_quantize
from planish.network import assign, attach, watch
from planish.training import Ingredient
from tests.training import tiny

SCHEMES = ("w4a4", "w3a3", "w2a4")


class Seen(Ingredient):
    """Which bits the weight recorders and the activation taps were set to, step by step."""

    def __init__(self, weights, activations):
        self.weights, self.activations, self.bits = weights, activations, []

    def after_step(self, run):
        weight = self.weights.recorders[1].format.bits
        tap = list(self.activations.taps.values())[1]
        self.bits.append((weight, tap.recorder.format.bits))


def test_each_step_imitates_one_scheme_for_weights_and_activations_alike():
    model = tiny.conv()
    watched = watch(model, torch.randn(1, 1, 8, 8))
    plans = [assign(watched, scheme) for scheme in SCHEMES]
    weights = WeightNoise(plans, "residual", until=1.0)
    activations = ActivationNoise(plans, "residual", until=1.0)
    seen = Seen(weights, activations)
    tiny.fit(model, [weights, activations, seen], run_settings=tiny.settings(epochs=10))
    assert set(seen.bits) == {(4, 4), (3, 3), (2, 4)}
    counts = [seen.bits.count(pair) for pair in set(seen.bits)]
    assert min(counts) > len(seen.bits) / 10


def test_several_schemes_resume_to_the_identical_result(tmp_path):
    settings = FlattenSettings(share=0.8, training=tiny.settings(epochs=3))
    whole = flatten(tiny.conv(), tiny.loader(), SCHEMES, settings=settings)
    steps = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        flatten(
            tiny.conv(), tiny.loader(), SCHEMES, settings=settings, checkpoint_dir=tmp_path / "c",
            should_stop=lambda: next(steps) == 7,
        )  # fmt: skip
    resumed = flatten(
        tiny.conv(), tiny.loader(), SCHEMES, settings=settings, checkpoint_dir=tmp_path / "c", resume=True
    )
    assert tiny.same(whole, resumed)
    assert not tiny.same(whole, flatten(tiny.conv(), tiny.loader(), "w4a4", settings=settings))


def test_a_scheme_for_weights_only_leaves_activations_alone_in_its_steps():
    model = tiny.conv()
    watched = watch(model, torch.randn(1, 1, 8, 8))
    noise = ActivationNoise([assign(watched, "w3"), assign(watched, "w3a3")], "residual", until=1.0)
    on = []

    class Look(Ingredient):
        def after_step(self, run):
            on.append(next(iter(noise.taps.values())).on)

    tiny.fit(model, [noise, Look()], run_settings=tiny.settings(epochs=5))
    assert set(on) == {True, False}


@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(0, 15, 0), (0, 7, 3), (-8, 7, 0)])
def test_rounding_in_place_is_fake_quantization(qmin, qmax, zero):
    torch.manual_seed(0)
    x = (3 * torch.randn(64, 33)).requires_grad_()
    step = 0.173
    ours = _Rounding.apply(x, step, qmin - zero, qmax - zero)
    gradient = torch.randn_like(x)
    (mine,) = torch.autograd.grad(ours, x, gradient)
    reference = fake_quantize(x, Grid(torch.tensor(step), torch.tensor(float(zero)), qmin, qmax))
    (theirs,) = torch.autograd.grad(reference, x, gradient)
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=0)
    torch.testing.assert_close(mine, theirs)
    assert (mine == 0).any()


class Idle(torch.nn.Identity):
    idle = True


def test_attention_stays_fused_while_its_taps_are_idle(monkeypatch):
    calls = []
    model = tiny.vit().eval()
    x = torch.randn(2, 1, 16, 16)
    expected = model(x)
    watched = watch(model, x[:1])

    from planish.network import attention

    spelled_out = attention.scaled_dot_product_attention
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), spelled_out(*a, **k))[1]
    )
    for tap, times in ((Idle, 0), (torch.nn.Identity, 2)):
        twin = copy.deepcopy(model)
        attach(twin, watched.products, lambda site, tap=tap: tap())
        calls.clear()
        torch.testing.assert_close(twin(x), expected, atol=1e-6, rtol=1e-5)
        assert len(calls) == times  # two blocks


def test_a_fused_attention_takes_its_operands_through_their_taps():
    """Rounding q, k and v before the fused kernel is what the spelled-out attention computes."""
    from planish.functional import Grid, fake_quantize

    class Rounded(torch.nn.Module):
        def __init__(self, idle):
            super().__init__()
            self.idle = idle

        def forward(self, x):
            steps = torch.linspace(0.2, 0.4, x.shape[-2])[:, None]  # of each row, so that a wrong axis shows
            return x if self.idle else fake_quantize(x, Grid(steps, torch.zeros(()), -8, 7))

    model = tiny.vit().eval()
    x = torch.randn(2, 1, 16, 16)
    products = watch(model, x[:1]).products
    outputs = []
    for spelled_out in (True, False):
        twin = copy.deepcopy(model)

        def tap(site, spelled_out=spelled_out):
            if not site.slot.startswith("attention"):
                return None
            inner = site.slot.endswith("_probabilities")
            return torch.nn.Identity() if inner and spelled_out else Rounded(idle=inner)

        attach(twin, products, tap)
        outputs.append(twin(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs[0], model(x), atol=1e-3)


def test_a_weight_made_from_parameters_is_measured_whole():
    """Its grid has a scale for every output channel, so a sample of the channels would not fit it."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(1, 96, 3))
    wide = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(96, 32, 3))
    model = torch.nn.Sequential(
        layer, torch.nn.ReLU(), wide, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 4)
    )
    settings = FlattenSettings(part=1.0, activation_part=1.0, share=1.0, training=tiny.settings(epochs=1))
    flat = flatten(model, tiny.loader(), "w4a4", settings=settings)
    assert all(torch.isfinite(p).all() for p in flat.parameters())
    assert list(flat.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("schemes", "options", "message"),
    [([], {}, "no scheme to flatten for"), ("w4a4", {"weight_gain": -1.0}, "weight_gain is -1"),
     ("w4a4", {"activation_gain": float("nan")}, "activation_gain is nan"),
     ("w4a4", {"reestimate_batches": -1}, "reestimate_batches is -1")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_before_any_step(schemes, options, message):
    settings = FlattenSettings(training=tiny.settings(), **options)
    with pytest.raises(PlanishError, match=message):
        flatten(tiny.conv(), tiny.loader(), schemes, settings=settings)
