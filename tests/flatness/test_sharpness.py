"""Sharpness of SAM and ASAM, and within the box of rounding, against dense references."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.flatness.sharpness import sam_sharpness, sharpness, worst_rounding
from planish.flatness.subject import Subject
from tests.flatness.dense import dense_loss, mlp, plain, subject_of
from tests.flatness.networks import attention_net, conv_net, images


@pytest.fixture(params=[conv_net, attention_net])
def model(request) -> nn.Module:
    return request.param()


def dense_ascent(subject: Subject, rho: float, adaptive: bool, steps: int) -> float:
    """The equations of the papers, on one long vector of all weights, in float64."""
    network, names = plain(subject)
    network.double()
    batches = [(x.double(), y) for x, y in subject.batches]
    fixed = {k: p.detach() for k, p in network.named_parameters()}
    paths = list(names.values())
    sizes = [fixed[path].numel() for path in paths]

    def loss(w: torch.Tensor) -> torch.Tensor:
        parts = {path: part.reshape(fixed[path].shape) for path, part in zip(paths, w.split(sizes), strict=True)}
        return dense_loss(network, fixed | parts, batches)

    w = torch.cat([fixed[path].flatten() for path in paths])
    t = w.abs() if adaptive else torch.ones_like(w)
    e = torch.zeros_like(w)
    for _ in range(steps):
        g = torch.func.grad(loss)(w + e)
        e = e + rho / steps * t**2 * g / (t * g).norm()
    return float(loss(w + e) - loss(w))


@pytest.mark.parametrize(("adaptive", "steps"), [(False, 1), (True, 1), (False, 4), (True, 3)])
def test_it_is_the_ascent_of_the_papers(model, adaptive, steps):
    subject = subject_of(model)
    found = sam_sharpness(subject, 0.3, adaptive=adaptive, steps=steps)
    assert found.rho == 0.3
    assert found.increase == pytest.approx(dense_ascent(subject, 0.3, adaptive, steps), rel=1e-3)
    assert found.increase > 0
    assert found.error > 0


def test_a_small_ball_rises_by_the_norm_of_the_gradient(model):
    subject = subject_of(model)
    network, names = plain(subject)
    loss = dense_loss(network, dict(network.named_parameters()), subject.batches)
    gradients = torch.autograd.grad(loss, [network.get_parameter(path) for path in names.values()])
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert sam_sharpness(subject, 1e-2).increase == pytest.approx(1e-2 * norm, rel=0.05)


def test_more_steps_find_no_less_in_a_wide_ball(model):
    subject = subject_of(model)
    assert sam_sharpness(subject, 2.0, steps=20).increase > 0.99 * sam_sharpness(subject, 2.0).increase


def test_only_asam_ignores_scales_that_layers_trade():
    def measure(scale: float, adaptive: bool) -> float:
        return sam_sharpness(Subject.prepare(mlp(scale), images(mlp()), ["w4a4"]), 0.3, adaptive).increase

    assert measure(8.0, True) == pytest.approx(measure(1.0, True), rel=1e-4)
    assert abs(measure(8.0, False) / measure(1.0, False) - 1) > 0.3


def test_the_box_of_rounding(model):
    subject = subject_of(model)
    network, names = plain(subject)
    parameters = dict(network.named_parameters())
    clean = dense_loss(network, parameters, subject.batches)
    gradients = torch.autograd.grad(clean, [parameters[path] for path in names.values()])
    moved = dict(parameters)
    for (name, path), gradient in zip(names.items(), gradients, strict=True):
        moved[path] = parameters[path] + subject.quantizers["w4a4"][name].scale / 2 * gradient.sign()
    found = worst_rounding(subject, "w4a4")
    assert found.rho == 0.5
    assert found.increase == pytest.approx((dense_loss(network, moved, subject.batches) - clean).item(), rel=1e-3)
    with subject.tapped(subject.grids("w4a4", activations=False)):
        rounded = subject.losses().mean().item()
    assert found.increase > rounded - clean.item()


def test_it_looks_at_the_network_as_it_is_switched(model):
    subject = subject_of(model, "w2a2")
    clean = sam_sharpness(subject).increase
    with subject.tapped(subject.grids("w2a2", weights=False)):
        rounded = sam_sharpness(subject).increase
    assert math.isfinite(rounded)
    assert rounded != clean
    assert sam_sharpness(subject).increase == clean


def test_a_network_without_gradients_is_flat():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1))
    batches = [(torch.randn(6, 1, 8, 8), torch.zeros(6, dtype=torch.long))]  # one class: the loss is zero everywhere
    subject = Subject.prepare(net, batches, ["w4a4"])
    for adaptive in (False, True):
        assert sam_sharpness(subject, adaptive=adaptive).increase == 0
    assert worst_rounding(subject, "w4a4").increase == 0


def test_the_report_gathers_all_and_is_plain_data(model):
    subject = subject_of(model, "w4a4", "w4")
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    report = sharpness(subject, "w4a4", images=20, draws=2)
    assert report.rounding[0].loss == pytest.approx(report.rounding[-1].loss, abs=10)
    assert report.rounding_low_bit[4].t == 1.0
    assert report.asam == sam_sharpness(subject, 0.5, adaptive=True, images=20)
    assert len(report.weight_noise) == len(report.activation_noise) == 5
    assert json.loads(json.dumps(asdict(report)))["sam"]["rho"] == 0.05
    assert report == sharpness(subject, "w4a4", images=20, draws=2)
    weights_only = sharpness(subject, "w4", images=20, draws=1)
    assert weights_only.activation_noise == weights_only.rounding_low_bit == []
    assert all(torch.equal(v, before[k]) for k, v in subject.model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_measures_the_same():
    model = attention_net()
    here = sharpness(subject_of(model), "w4a4", draws=2)
    moved = [(x.cuda(), y.cuda()) for x, y in images(model)]
    there = sharpness(Subject.prepare(model.cuda(), moved, ["w4a4"]), "w4a4", draws=2)
    for name in ("sam", "asam", "worst"):
        assert getattr(there, name).increase == pytest.approx(getattr(here, name).increase, rel=1e-2)
    for one, other in zip(here.weight_noise, there.weight_noise, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-2)


def test_errors(model):
    subject = subject_of(model)
    for rho, steps in ((0.0, 1), (float("nan"), 1), (0.1, 0)):
        with pytest.raises(PlanishError, match="radius above 0"):
            sam_sharpness(subject, rho, steps=steps)
    with pytest.raises(PlanishError, match="radius above 0"):
        worst_rounding(subject, "w4a4", -1)
