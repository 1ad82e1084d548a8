"""What layers put out, how it is compared, and how it is changed without touching an integer."""

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.functional import quantize as codes_of
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round
from planish.ptq.outputs import (
    KeepFloat,
    Moments,
    change_layers,
    change_outputs,
    float_twin,
    layers_of,
    output_moments,
)
from planish.ptq.statistics import MatchStatistics
from planish.scheme import Format, Scheme
from tests.network.zoo import build, image
from tests.ptq.work import NETWORKS, network, same, state, work

RTN = (FoldBatchNorm(), Calibrate(), Round())
X = image(8, channels=4)


def line(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def test_moments_over_batches_are_those_of_all_values():
    torch.manual_seed(0)
    parts = [1e3 + torch.randn(n, 5, 4, 3) for n in (2, 7, 1)]
    layer, moments = nn.Conv2d(1, 5, 1), Moments()
    for part in parts:
        moments.add(layer, part)
    values = torch.cat(parts).double()
    torch.testing.assert_close(moments.mean, values.mean((0, 2, 3)), atol=1e-9, rtol=0)
    torch.testing.assert_close(moments.variance, values.var((0, 2, 3), unbiased=False), atol=1e-9, rtol=1e-9)
    assert moments.calls == 3


def test_channels_of_tokens_are_the_last_dimension():
    layer = nn.Linear(4, 6)
    x = torch.randn(3, 7, 4)
    found = output_moments(nn.Sequential(layer), ["0"], [x])["0"]
    torch.testing.assert_close(found.mean.float(), layer(x).mean((0, 1)))


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.ran = nn.Linear(4, 4), nn.Linear(4, 4), []

    def forward(self, x):
        self.ran.append("a")
        x = self.a(x)
        self.ran.append("b")
        return self.b(x)


def test_a_pass_can_end_early_and_leaves_no_hook():
    model = Counts()
    assert list(output_moments(model, ["a"], [torch.randn(2, 4)] * 2, stop=True)) == ["a"]
    assert model.ran == ["a", "a"]
    assert not model.a._forward_hooks


CASES = {
    "linear": (lambda: nn.Linear(4, 6), torch.randn(3, 5, 4)),
    "no bias": (lambda: nn.Linear(4, 6, bias=False), torch.randn(3, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), X),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), X),
}


@pytest.mark.parametrize("scheme", ["w3a4", "w2a4", "group"])
@pytest.mark.parametrize(("make", "x"), CASES.values(), ids=CASES)
def test_a_factor_and_a_shift_keep_the_integers(make, x, scheme):
    if scheme == "group":
        scheme = Scheme("group", Format(3, "group", group_size=2), None)
    model = line(nn.Identity(), nn.Linear(x.shape[-1], x.shape[-1]), make(), nn.LeakyReLU(), nn.LazyLinear(6))
    model(x)
    calibration = work(model, [x], scheme, [Calibrate(), Round()])
    (layer,) = (layer for layer in layers_of(calibration) if layer.path == "2")
    ours = calibration.model[:3]
    weight = layer.module._parameters["weight"]
    with torch.no_grad():
        before, integers = ours(x), codes_of(weight, layer.tap.grid)
        factor, shift = torch.rand(6) * 3 + 0.2, torch.randn(6)
        change_outputs(layer, factor, shift)
        after = ours(x)
        view = (-1,) if isinstance(layer.module, nn.Linear) else (-1, 1, 1)
        torch.testing.assert_close(after, before * factor.view(view) + shift.view(view), atol=1e-5, rtol=1e-5)
        assert torch.equal(codes_of(weight, layer.tap.grid), integers)
        assert torch.equal(layer.tap(weight), weight.data)  # on the grid
        change_outputs(layer, None, -shift)
        torch.testing.assert_close(ours(x), before * factor.view(view), atol=1e-5, rtol=1e-5)


def test_which_layers():
    model, x = build("vit_gray_28")
    calibration = work(model, [x], passes=RTN)
    layers = layers_of(calibration)
    assert [layer.path for layer in layers][:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert all(layer.tap is not None for layer in layers)
    whole = Scheme("whole", Format(4), Format(4, symmetric=False))
    assert all(layer.tap is None for layer in layers_of(work(model, [x], whole, RTN)))
    twice = work(*(lambda built: (built[0], [built[1]]))(build("twice")), passes=RTN)
    assert {layer.path: layer.tap is not None for layer in layers_of(twice)} == {"body": False, "head": True}
    encoder = work(*(lambda built: (built[0], [built[1]]))(build("encoder")), passes=RTN)
    assert not any("out_proj" in layer.path for layer in layers_of(encoder))  # its forward never runs
    allowed = work(model, [x], passes=RTN)
    allowed.assignment.formats.update(dict.fromkeys(allowed.assignment.formats))
    assert layers_of(allowed) == []


def test_the_float_network_is_found_in_latent_weights_or_in_what_was_kept():
    model, batches = network("conv")
    x = batches[0]
    calibration = work(model, batches, passes=RTN)
    twin = float_twin(calibration)
    assert not any(True for _ in taps_of(twin))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), atol=1e-4, rtol=1e-4)
    assert float_twin(calibration) is twin

    def damage(calibration):
        with torch.no_grad():
            calibration.model[9]._parameters["weight"].mul_(1.5)

    with pytest.raises(PlanishError, match=r"put KeepFloat\(\) into the list"):
        float_twin(work(model, batches, passes=[*RTN, damage]))
    kept = work(model, batches, passes=[FoldBatchNorm(), KeepFloat(), *RTN[1:], damage])
    with torch.no_grad():
        torch.testing.assert_close(float_twin(kept)(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scheme", ["w3a3", "w2"])
def test_the_walk_hands_out_what_running_anew_does(name, scheme, monkeypatch):
    model, batches = network(name)
    found = {}
    for way in ("walked", "anew"):
        calibration, seen = work(model, batches, scheme, RTN), []

        def change(layer, exact, now, seen=seen):
            seen.append((layer.path, exact.mean, exact.variance, now.mean, now.variance))
            change_outputs(layer, None, exact.mean - now.mean + 0.1)

        if way == "anew":
            monkeypatch.setattr("planish.ptq.outputs._halts", lambda *_: None)
        assert change_layers(calibration, change) == len(layers_of(calibration)) == len(seen)
        found[way] = seen, state(calibration.model)
    for one, other in zip(found["walked"][0], found["anew"][0], strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1:], other[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["walked"][1], found["anew"][1], rtol=1e-4, atol=1e-5)


def test_layers_that_run_twice_are_handed_out_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.body(self.body(self.first(x)).relu()))

    torch.manual_seed(0)
    x, calls = torch.randn(30, 6), {}
    calibration = work(Twice().eval(), [x, x], "w3a3", RTN)
    assert change_layers(calibration, lambda layer, exact, now: calls.update({layer.path: (exact, now)})) == 3
    assert {path: (exact.calls, now.calls) for path, (exact, now) in calls.items()} == {
        "first": (2, 2), "body": (4, 4), "head": (2, 2)
    }  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_kept_before_the_float_network_changed_is_let_go(name):
    model, batches = network(name)
    late = work(model, batches, "w4a4", [*RTN, MatchStatistics()])
    early = work(model, batches, "w4a4", [KeepFloat(), *RTN, MatchStatistics()])
    assert same(state(early.model), state(late.model))
