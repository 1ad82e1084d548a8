"""Cross-layer equalization: equal ranges, equal outputs, smaller rounding errors."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import _equalize as oracle

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.network.chains import Chain
from planish.ptq import Calibrate, FoldBatchNorm, Round, equalize, quantize
from planish.ptq.equalize import Equalize, equalizing_scales, input_ranges, output_ranges
from planish.scheme import Scheme
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build, image
from tests.ptq.work import notes, same, state, work

X = image(9, channels=4)
SURE = Equalize(guard=False)
TENSOR = Scheme.parse("w4a8")
TENSOR = replace(TENSOR, weights=replace(TENSOR.weights, granularity="tensor"))


def line(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def conv(*args, **options):
    return nn.Conv2d(*args, 3, padding=1, **options)


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def wild(model, decades=2.0, seed=1):
    """Scale the channels between rectified convolutions at random; the outputs stay."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for first, second in pairwise(layers):
            s = 10 ** (decades * (torch.rand(first.out_channels, generator=generator) - 0.5))
            first.weight.mul_(s.view(-1, 1, 1, 1))
            first.bias.mul_(s)
            second.weight.div_(s.view(-1, 1, 1, 1) if second.groups > 1 else s.view(1, -1, 1, 1))
    return model


def separable():
    """Expansion, depthwise convolution, projection, as in MobileNetV2 (with ReLU)."""
    model = line(
        conv(4, 8), nn.ReLU(), nn.Conv2d(8, 24, 1), nn.ReLU(), conv(24, 24, groups=24), nn.ReLU(), nn.Conv2d(24, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.1)
    return model


def test_two_layers_as_the_equations_say():
    model = line(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    w1, b1, w2 = (p.detach().clone() for p in (model[0].weight, model[0].bias, model[2].weight))
    work(model, [torch.randn(6, 3)])  # nothing yet
    calibration = work(model, [torch.randn(6, 3)], passes=[SURE])
    ours = calibration.model
    for i in range(4):  # eq. 9 to 11
        r1, r2 = 2 * w1[i].abs().max(), 2 * w2[:, i].abs().max()
        s = torch.sqrt(r1 * r2) / r2
        torch.testing.assert_close(ours[0].weight[i], w1[i] / s)
        torch.testing.assert_close(ours[0].bias[i], b1[i] / s)
        torch.testing.assert_close(ours[2].weight[:, i], w2[:, i] * s)
        torch.testing.assert_close(ours[0].weight[i].abs().max(), ours[2].weight[:, i].abs().max())
    assert "1 pairs of layers were equalized" in notes(calibration)[0]


def test_against_pytorch():
    model = line(conv(4, 6), conv(6, 5))
    with torch.no_grad():  # PyTorch's range is max - min, which is twice the largest magnitude of mirrored weights
        model[0].weight[:, 2:] = -model[0].weight[:, :2]
        model[1].weight[1:3] = -model[1].weight[3:5]
        model[1].weight[0] = 0.01
    theirs = copy.deepcopy(model)
    oracle.cross_layer_equalization(theirs[0], theirs[1])
    ours = work(model, [X], passes=[SURE]).model
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


KINDS = {
    "grouped": [conv(4, 6), nn.ReLU(inplace=True), conv(6, 4, groups=2)],
    "grouped first": [conv(4, 8, groups=2), nn.ReLU(), conv(8, 5)],
    "multiplier": [conv(4, 6), nn.ReLU(), conv(6, 12, groups=6), nn.LeakyReLU(), nn.Conv2d(12, 3, 1)],
    "transposed": [nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 9, 2, groups=3)],
    "flattened": [conv(4, 6, bias=False), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(54, 5)],
    "vectors": [nn.Flatten(), nn.Linear(324, 7), nn.ReLU(), nn.Linear(7, 5)],
}


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
def test_outputs_stay_and_ranges_are_equal(layers):
    model = line(*copy.deepcopy(layers))
    torch.manual_seed(3)
    for parameter in model.parameters():  # wildly different channels
        parameter.data *= 10 ** (2 * torch.rand(len(parameter)) - 1).view(-1, *[1] * (parameter.dim() - 1))
    calibration = work(model, [X], passes=[SURE])
    ours = calibration.model
    with torch.no_grad():
        assert close(ours(X.flip(2)), model(X.flip(2)))
    weighted = [layer for layer in ours if hasattr(layer, "weight")]
    repeats = 9 if any(isinstance(layer, nn.AvgPool2d) for layer in ours) else 1
    assert not same(state(ours), state(model))
    for first, second in pairwise(weighted):
        torch.testing.assert_close(output_ranges(first), input_ranges(second, repeats), rtol=2e-3, atol=0)


def test_ranges_of_channels():
    torch.manual_seed(0)
    flat = nn.Linear(12, 5).weight.detach().abs()
    expected = torch.stack([flat[:, 3 * i : 3 * i + 3].max() for i in range(4)])
    layer = nn.Linear(12, 5)
    layer.weight.data = flat
    assert torch.equal(input_ranges(layer, 3), expected)
    for layer in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)):
        # a channel's range is what the layer makes of this channel alone, or shows in this channel alone
        for i in range(4):
            x = torch.zeros(1, 4, 5, 5)
            x[0, i, 2, 2] = 1
            seen = layer(x) - layer(torch.zeros(1, 4, 5, 5))
            torch.testing.assert_close(input_ranges(layer)[i], seen.abs().max(), atol=1e-6, rtol=0)
        x = torch.eye(4).view(4, 4, 1, 1) * F.pad(torch.ones(1, 1), (2, 2, 2, 2))
        seen = layer(x) - layer(torch.zeros(1, 4, 5, 5))
        torch.testing.assert_close(output_ranges(layer), seen.abs().amax((0, 2, 3)), atol=1e-6, rtol=0)


def test_a_chain_converges_and_rounds_better():
    model = wild(separable())
    batches = [X, X.flip(3)]
    calibration = work(model, batches, TENSOR, [SURE])
    layers = [layer for layer in calibration.model if isinstance(layer, nn.Conv2d)]
    for first, second in pairwise(layers):
        torch.testing.assert_close(output_ranges(first), input_ranges(second), rtol=5e-3, atol=0)
    with torch.no_grad():
        assert close(calibration.model(X), model(X))
        exact = model(X)
        plain = quantize(model, batches, TENSOR)(X)
        ours = quantize(model, batches, TENSOR, [FoldBatchNorm(), Equalize(), Calibrate(), Round()])(X)
    assert (ours - exact).norm() < 0.3 * (plain - exact).norm()


def test_more_sweeps_come_closer():
    def worst(rounds):
        ours = work(wild(separable()), [X], passes=[Equalize(rounds=rounds, tolerance=0, guard=False)]).model
        layers = [layer for layer in ours if isinstance(layer, nn.Conv2d)]
        pairs = pairwise(layers)
        return max(float((output_ranges(a) / input_ranges(b)).log().abs().max()) for a, b in pairs)

    assert worst(1) > worst(4) > worst(30)
    assert worst(30) < 1e-3


def test_channels_that_are_off_keep_their_scale():
    first, second = torch.tensor([1.0, 0.0, 1e-7, 4.0]), torch.tensor([4.0, 1.0, 1.0, 0.0])
    assert equalizing_scales(first, second).tolist() == [0.5, 1.0, 1.0, 1.0]


def test_a_pair_that_changes_the_outputs_is_undone(monkeypatch):
    model = line(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    monkeypatch.setattr(equalize, "find_chains", lambda *_: [Chain("0", "2"), Chain("2", "4")])
    x = torch.randn(6, 3)
    calibration = work(model, [x], passes=[SURE])
    ours = calibration.model
    torch.testing.assert_close(output_ranges(ours[0]), input_ranges(ours[2]))
    assert torch.equal(ours[4].weight, model[4].weight)
    assert close(ours(x), model(x))
    assert "1 pairs of layers were equalized; 1 pairs were left as they were" in notes(calibration)[0]


def test_it_is_undone_where_it_does_not_help(monkeypatch):
    errors = iter([1.0, 2.0])
    monkeypatch.setattr(equalize, "_rounding_error", lambda _: next(errors))
    model = separable()
    calibration = work(model, [X], passes=[Equalize()])
    assert same(state(calibration.model), state(model))
    assert "the error rose from 1 to 2, so all of it was undone" in notes(calibration)[0]


def test_the_guard_keeps_what_helps():
    model = wild(separable())
    guarded, sure = (work(model, [X], TENSOR, [step]).model for step in (Equalize(), SURE))
    assert same(state(guarded), state(sure))


@pytest.mark.parametrize("name", ["vit_gray_28", "convnext"])
def test_nothing_to_do(name):
    model, x = build(name)
    calibration = work(model, [x], passes=[FoldBatchNorm(), Equalize()])
    assert same(state(calibration.model), state(model))
    assert notes(calibration) == ["0 pairs of layers were equalized"]


def test_relu6_is_left_alone():
    model = line(conv(4, 6), nn.ReLU6(), conv(6, 6, groups=6), nn.ReLU6(), conv(6, 3))
    calibration = work(model, [X], passes=[Equalize()])
    assert same(state(calibration.model), state(model))
    assert "2 pairs have a clipping activation such as ReLU6 between them" in notes(calibration)[0]


def test_channels_last_weights():
    model = wild(separable()).to(memory_format=torch.channels_last)
    ours = work(model, [X], passes=[SURE]).model
    assert close(ours(X), model(X))
    assert not same(state(ours), state(model))


def test_it_comes_before_the_ranges_are_set():
    with pytest.raises(PlanishError, match="put it before Calibrate"):
        work(separable(), [X], passes=[Calibrate(), Equalize()])


@pytest.mark.parametrize(("options", "match"), [({"rounds": 0}, "rounds is 0"), ({"tolerance": -1}, "tolerance is -1")])
def test_bad_options(options, match):
    with pytest.raises(PlanishError, match=match):
        Equalize(**options)


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", **RECIPES["resnet"]["arguments"]).eval()
    x = torch.randn(4, 1, 32, 32)
    quantized = quantize(model, [x], "w4a4", [FoldBatchNorm(), SURE, Calibrate(), Round()])
    assert not torch.equal(quantized(x), quantize(model, [x], "w4a4")(x))
    save(quantized, tmp_path / "q.safetensors", recipe=RECIPES["resnet"], preprocessing=LOOKS, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    assert torch.equal(loaded(x), quantized(x))
