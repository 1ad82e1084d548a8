"""Matched statistics: mean and variance of all outputs are those of the float network, and the integers stay."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.functional import quantize as codes_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.bias import CorrectBias
from planish.ptq.outputs import Moments, float_twin, layers_of, output_moments
from planish.ptq.statistics import MatchStatistics, matching_affine
from planish.scheme import Scheme
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build
from tests.ptq.work import NETWORKS, network, notes, same, state, work

RTN = (FoldBatchNorm(), Calibrate(), Round())


def moments(calibration):
    paths = [layer.path for layer in layers_of(calibration)]
    exact = output_moments(float_twin(calibration), paths, calibration.batches)
    now = output_moments(calibration.model, paths, calibration.batches)
    return [(exact[path], now[path]) for path in exact]


def of(values):
    found = Moments()
    found.add(nn.Linear(1, 1), values)
    return found


def test_the_affine_of_a_channel():
    torch.manual_seed(0)
    wanted, given = torch.randn(50, 3) * torch.tensor([1.0, 2.0, 0.5]) + 3, torch.randn(50, 3)
    factor, shift = matching_affine(of(wanted), of(given), limit=10)
    for i in range(3):
        matched = factor[i] * given[:, i] + shift[i]
        assert matched.mean() == pytest.approx(wanted[:, i].mean().item(), abs=1e-5)
        assert matched.std() == pytest.approx(wanted[:, i].std().item(), abs=1e-5)
    factor, shift = matching_affine(of(wanted), of(given), limit=1.25)
    assert factor[1] == 1.25
    assert factor[2] == 0.8
    assert (factor * given + shift).mean(0).tolist() == pytest.approx(wanted.mean(0).tolist(), abs=1e-5)


def test_constant_channels_get_a_shift_only():
    wanted, given = torch.randn(20, 2) * torch.tensor([1.0, 0.0]) + 2, torch.randn(20, 2)
    factor, shift = matching_affine(of(wanted), of(given), limit=4)
    assert factor[1] == 1
    assert float(shift[1]) == pytest.approx(2 - float(given[:, 1].mean()), abs=1e-5)
    assert (matching_affine(of(given), of(wanted), limit=4)[0][1]) == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scheme", ["w3a3", "w2a4"])
def test_every_layer_of_a_network(name, scheme):
    model, batches = network(name)
    plain = work(model, batches, scheme, RTN)
    ours = work(model, batches, scheme, [*RTN, MatchStatistics(limit=100)])
    for exact, now in moments(ours):
        scale = exact.variance.sqrt()
        live = (scale > 1e-4 * scale.max()) & (now.variance > 0)
        assert live.sum() > 0.5 * len(live)
        assert ((now.mean - exact.mean).abs() / scale)[live].max() < 1e-3
        assert (now.variance.sqrt() / scale)[live].sub(1).abs().max() < 1e-3
    for before, after in zip(layers_of(plain), layers_of(ours), strict=True):
        codes = [codes_of(layer.module._parameters["weight"], layer.tap.grid) for layer in (before, after)]
        assert torch.equal(*codes)
        assert not torch.equal(before.tap.scale, after.tap.scale)
    assert "and the mean of 0 more were matched" in notes(ours)[-1]
    again = work(model, batches, scheme, [*RTN, MatchStatistics(limit=100)])
    assert same(state(again.model), state(ours.model))


def test_shared_grids_get_their_means_only():
    scheme = Scheme.parse("w3a3")
    scheme = replace(scheme, weights=replace(scheme.weights, granularity="tensor"))
    model, batches = network("separable")
    ours = work(model, batches, scheme, [*RTN, MatchStatistics()])
    bias = work(model, batches, scheme, [*RTN, CorrectBias()])
    assert same(state(ours.model), state(bias.model))
    assert notes(ours)[-1].startswith("mean and variance of 0 layers and the mean of")


def test_the_spread_is_restored():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 4)).eval()
    x = torch.randn(400, 16)
    with torch.no_grad():
        plain, ours = (quantize(model, [x], "w2a4", [*RTN, *more])(x).std(0) for more in ([], [MatchStatistics()]))
        exact = model(x).std(0)
    assert (ours / exact - 1).abs().max() < 1e-3 < (plain / exact - 1).abs().max()


def test_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", **RECIPES["resnet"]["arguments"]).eval()
    x = torch.randn(4, 1, 32, 32)
    quantized = quantize(model, [x], "w4a4", [*RTN, MatchStatistics()])
    save(quantized, tmp_path / "q.safetensors", recipe=RECIPES["resnet"], preprocessing=LOOKS, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), quantized(x))


def test_nothing_to_do():
    model, x = build("einsum")
    calibration = work(model, [x], passes=RTN)
    calibration.assignment.formats.update(dict.fromkeys(calibration.assignment.formats))
    before = state(calibration.model)
    MatchStatistics()(calibration)
    assert same(state(calibration.model), before)
    assert notes(calibration) == ["mean and variance of 0 layers and the mean of 0 more were matched"]


def test_bad_options():
    with pytest.raises(PlanishError, match=r"limit is 0\.5"):
        MatchStatistics(limit=0.5)
