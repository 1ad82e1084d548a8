"""Loss on the way to the rounded weights, and under noise of the size of a step."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.errors import PlanishError
from planish.flatness.perturbations import gaussians
from planish.flatness.responses import noise_response, rounding_path
from planish.flatness.subject import Subject
from planish.ptq import quantize
from tests.flatness.dense import dense_loss, mlp, plain, subject_of
from tests.flatness.networks import attention_net, conv_net, images


@pytest.fixture(params=[conv_net, attention_net])
def model(request) -> nn.Module:
    return request.param()


def test_the_path_starts_in_float_and_passes_the_rounded_network(model):
    subject = subject_of(model, "w3a3")
    batches = images(model)
    weights_only = quantize(model, [x for x, _ in batches], "w3")
    everything = quantize(model, [x for x, _ in batches], "w3a3")
    labels = torch.cat([y for _, y in batches])
    for network, rounded, t in ((model, False, 0.0), (weights_only, False, 1.0), (everything, True, 1.0)):
        (point,) = rounding_path(subject, "w3a3", [t], rounded_activations=rounded)
        with torch.no_grad():
            logits = torch.cat([network(x) for x, _ in batches])
        losses = F.cross_entropy(logits, labels, reduction="none")
        assert point.t == t
        assert point.loss == pytest.approx(losses.mean().item(), rel=1e-4)
        assert point.error == pytest.approx(losses.std().item() / math.sqrt(len(labels)), rel=1e-4)
        assert point.top1 == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_the_path_is_the_straight_line_in_the_weights(model):
    subject = subject_of(model)
    network, names = plain(subject)
    grids = subject.grids("w4a4", activations=False)
    ts = [0.25, 1.5, -0.5]
    for t, point in zip(ts, rounding_path(subject, "w4a4", ts), strict=True):
        parameters = dict(network.named_parameters())
        for name, grid in grids.items():
            w = parameters[names[name]]
            parameters[names[name]] = w + t * (grid(w) - w)
        assert point.loss == pytest.approx(dense_loss(network, parameters, subject.batches).item(), rel=1e-5)


def test_by_default_the_path_goes_beyond_the_rounding(model):
    assert [p.t for p in rounding_path(subject_of(model), "w4a4")] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("where", ["weights", "activations"])
def test_no_noise_is_the_clean_loss_and_much_noise_hurts(model, where):
    subject = subject_of(model)
    clean = subject.losses().mean().item()
    points = noise_response(subject, "w4a4", (0.0, 0.5, 64.0), draws=3, where=where)
    assert [p.sigma for p in points] == [0.0, 0.5, 64.0]
    assert points[0].loss == pytest.approx(clean, rel=1e-6)
    assert points[0].error == pytest.approx(0, abs=1e-7)
    assert points[2].loss > points[1].loss
    assert points[2].error > points[1].error > 0


@pytest.mark.parametrize("relative_to", ["step", "rms"])
def test_weight_noise_is_that_of_a_plain_loop(model, relative_to):
    subject = subject_of(model)
    network, names = plain(subject)
    grids = subject.grids("w4a4", activations=False)
    sigmas = [0.3, 2.0]
    found = noise_response(subject, "w4a4", sigmas, draws=3, relative_to=relative_to, seed=5)
    weights = {name: network.get_parameter(names[name]).detach() for name in grids}
    for sigma, point in zip(sigmas, found, strict=True):
        losses = []
        for draw in range(3):
            parameters = dict(network.named_parameters())
            for name, e in gaussians(weights, 5, draw).items():
                w = weights[name]
                unit = grids[name].scale if relative_to == "step" else w.pow(2).mean().sqrt()
                parameters[names[name]] = w + sigma * unit * e
            losses.append(dense_loss(network, parameters, subject.batches).item())
        assert point.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert point.error == pytest.approx(torch.tensor(losses).std().item() / math.sqrt(3), rel=1e-2)


@pytest.mark.parametrize("relative_to", ["step", "rms"])
def test_activation_noise_of_one_linear_layer_has_the_variance_of_its_formula(relative_to):
    """Noise on the input of a linear layer moves its output by sigma u |row of the weight|, exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    batches = [(3 * torch.randn(4000, 1, 8, 8), torch.zeros(4000, dtype=torch.long))]
    subject = Subject.prepare(net, batches, ["w8a8"])
    logits = []
    subject.losses = lambda batches: logits.append(subject.logits(batches)) or torch.zeros(1)  # type: ignore[method-assign]
    noise_response(subject, "w8a8", (0.0, 30.0), draws=1, where="activations", relative_to=relative_to)
    (grid,) = subject.grids("w8a8", weights=False).values()
    unit = grid.scale.item() if relative_to == "step" else 3.0
    expected = 30 * unit * net[1].weight.detach().norm(dim=1)
    torch.testing.assert_close((logits[1] - logits[0]).std(0), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("where", ["weights", "activations"])
@pytest.mark.parametrize("relative_to", ["step", "rms"])
def test_scales_that_layers_trade_do_not_matter(where, relative_to):
    results = []
    for scale in (1.0, 8.0):
        net = mlp(scale)
        subject = Subject.prepare(net, images(mlp()), ["w4a4"])
        results.append(noise_response(subject, "w4a4", draws=2, where=where, relative_to=relative_to))
    for one, other in zip(*results, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.parametrize("where", ["weights", "activations"])
def test_the_seed_decides(model, where):
    subject = subject_of(model)

    def losses(seed: int, sigmas=(0.5, 1.0)) -> list[float]:
        return [p.loss for p in noise_response(subject, "w4a4", sigmas, draws=2, where=where, seed=seed)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
    assert losses(0)[1:] == losses(0, [1.0])  # the draws are those of every sigma


def test_one_draw_and_one_image_have_no_error(model):
    subject = subject_of(model)
    (point,) = noise_response(subject, "w4a4", [1.0], draws=1)
    assert math.isnan(point.error)
    (on_path,) = rounding_path(subject, "w4a4", [1.0], images=1)
    assert math.isnan(on_path.error)
    assert on_path.top1 in (0.0, 1.0)
    assert set(asdict(on_path)) == {"t", "loss", "error", "top1"}


def test_errors(model):
    subject = subject_of(model, "w4a4", "w4")
    with pytest.raises(PlanishError, match="choose weights or activations"):
        noise_response(subject, "w4a4", where="biases")
    with pytest.raises(PlanishError, match="step or rms"):
        noise_response(subject, "w4a4", relative_to="max")
    with pytest.raises(PlanishError, match="1 draw or more"):
        noise_response(subject, "w4a4", draws=0)
    with pytest.raises(PlanishError, match="sigmas of 0 or more"):
        noise_response(subject, "w4a4", [-1.0])
    with pytest.raises(PlanishError, match="quantizes no activations"):
        noise_response(subject, "w4", where="activations")
    with pytest.raises(PlanishError, match="prepare the subject"):
        rounding_path(subject, "w2a2")
