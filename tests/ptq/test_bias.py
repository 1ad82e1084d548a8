"""Bias correction: the means of all outputs are those of the float network."""

import pytest
import timm
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.errors import PlanishError
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Round, quantize
from planish.ptq.bias import CorrectBias
from planish.ptq.outputs import KeepFloat, float_twin, layers_of, output_moments
from planish.quantizers import fit_grid
from planish.scheme import Scheme
from tests.deploy.tiny import LOOKS, RECIPES
from tests.network.zoo import build, image
from tests.ptq.reference import on_grid
from tests.ptq.work import NETWORKS, network, notes, same, state, work

RTN = (FoldBatchNorm(), Calibrate(), Round())


def line(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def relative_difference(calibration):
    """Largest difference of the mean of a channel, in standard deviations."""
    paths = [layer.path for layer in layers_of(calibration)]
    exact = output_moments(float_twin(calibration), paths, calibration.batches)
    now = output_moments(calibration.model, paths, calibration.batches)
    return max(float(((now[p].mean - exact[p].mean).abs() / exact[p].variance.sqrt()).max()) for p in exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["w3a3", "w2"])
def test_a_single_layer(bias, scheme):
    layer, batches = line(nn.Conv2d(4, 6, 3, bias=bias)), [image(8, 4, n) for n in (5, 2)]
    calibration = work(layer, batches, Scheme.parse(scheme), [*RTN, CorrectBias()])
    x = torch.cat(batches)
    with torch.no_grad():
        ours, exact = calibration.model(x).mean((0, 2, 3)), layer(x).mean((0, 2, 3))
        assert (ours - exact).abs().max() < 1e-5
        assert (work(layer, batches, scheme, RTN).model(x).mean((0, 2, 3)) - exact).abs().max() > 1e-4


@torch.no_grad()
def twin(model, x, scheme):
    """Section 4.2 for linear layers with ReLU between them: b <- b + E[y] - E[y~], layer after layer."""
    scheme = Scheme.parse(scheme)
    exact, ours, biases = x, x, []
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        here = scheme.edge() if i in (0, len(layers) - 1) else scheme
        rounded = (
            on_grid(ours, fit_grid(exact, here.activations))
            @ on_grid(layer.weight, fit_grid(layer.weight, here.weights)).T
        )
        exact = exact @ layer.weight.T + layer.bias
        biases.append(exact.mean(0) - rounded.mean(0))
        ours = rounded + biases[-1]
        exact, ours = exact.relu(), ours.relu()
    return biases


def test_as_the_twin_computes_it():
    model, x = line(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(40, 6)
    ours = work(model, [x], "w3a3", [*RTN, CorrectBias()]).model
    for layer, bias in zip(ours[::2], twin(model, x, "w3a3"), strict=True):
        torch.testing.assert_close(layer.bias.data, bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_of_a_network(name):
    model, batches = network(name)
    plain, ours = work(model, batches, "w3a3", RTN), work(model, batches, "w3a3", [*RTN, CorrectBias()])
    assert relative_difference(plain) > 0.02
    assert relative_difference(ours) < 1e-4
    weights = [(n, v) for n, v in state(plain.model).items() if not n.endswith("bias")]
    assert all(torch.equal(value, ours.model.state_dict()[name]) for name, value in weights)
    assert same(state(work(model, batches, "w3a3", [*RTN, CorrectBias()]).model), state(ours.model))


def test_after_a_pass_that_moves_weights():
    model, batches = network("conv")

    class Move:
        name = "move"

        @torch.no_grad()
        def __call__(self, calibration):
            for name, tap in taps_of(calibration.model):
                if name.endswith("weight"):
                    weight = calibration.model.get_submodule(name[:-7])._parameters["weight"]
                    weight.copy_(tap(weight + tap.scale * 0.6))

    with pytest.raises(PlanishError, match="KeepFloat"):
        work(model, batches, passes=[*RTN, Move(), CorrectBias()])
    kept = work(model, batches, passes=[FoldBatchNorm(), KeepFloat(), *RTN[1:], Move(), CorrectBias()])
    assert relative_difference(kept) < 1e-4


def test_saved_with_the_biases_it_made(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", **RECIPES["resnet"]["arguments"]).eval()
    x = torch.randn(4, 1, 32, 32)
    quantized = quantize(model, [x], "w4a4", [Calibrate(), Round(), CorrectBias()])  # BatchNorm is not folded
    assert quantized.layer1[0].conv1.bias is not None
    assert model.layer1[0].conv1.bias is None
    save(quantized, tmp_path / "q.safetensors", recipe=RECIPES["resnet"], preprocessing=LOOKS, protocol={})
    loaded = load(tmp_path / "q.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), quantized(x))
    assert not any(p.requires_grad for p in quantized.parameters())


def test_nothing_to_do():
    model, x = build("einsum")
    calibration = work(model, [x], passes=RTN)
    calibration.assignment.formats.update(dict.fromkeys(calibration.assignment.formats))
    before = state(calibration.model)
    CorrectBias()(calibration)
    assert same(state(calibration.model), before)
    assert notes(calibration) == ["no layer can take a bias"]
