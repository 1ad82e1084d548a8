"""Taps that move tensors, gradients through them, and the choice of images."""

from __future__ import annotations

import math

import pytest
import torch

from planish.errors import PlanishError
from planish.flatness.perturbations import (
    Along,
    Noise,
    chosen,
    gaussians,
    loss_gradients,
    mean_loss,
    rms,
    shifted,
    standard_error,
    step_of,
    weights_of,
)
from planish.flatness.subject import Subject
from tests.flatness.dense import dense_loss, plain
from tests.flatness.networks import attention_net, conv_net, images


@pytest.fixture(params=[conv_net, attention_net])
def subject(request) -> Subject:
    model = request.param()
    return Subject.prepare(model, images(model), ["w4a4"])


def test_along_is_exact_at_both_ends_and_goes_beyond(subject):
    grid = next(iter(subject.grids("w4a4", activations=False).values()))
    x = next(iter(weights_of(subject, list(subject.grids("w4a4", activations=False))).values())) * 1.3
    assert torch.equal(Along(grid, 0.0)(x), x)
    assert torch.equal(Along(grid, 1.0)(x), grid(x))
    torch.testing.assert_close(Along(grid, 2.0)(x) - grid(x), grid(x) - x)


def test_weights_are_those_of_the_folded_network(subject):
    model, names = plain(subject)
    weights = weights_of(subject)
    assert list(weights) == list(names)
    assert all(torch.equal(weights[name], model.get_parameter(path)) for name, path in names.items())
    assert not any(weight.requires_grad for weight in weights.values())


def test_gradients_are_those_of_torch_func_at_shifted_weights(subject):
    model, names = plain(subject)
    weights = weights_of(subject)
    shifts = {name: 0.1 * e for name, e in gaussians(weights, 3, 0).items()}
    found = loss_gradients(subject, subject.batches, shifts)
    moved = {path: (weights[name] + shifts[name]).double() for name, path in names.items()}
    doubled = [(x.double(), y) for x, y in subject.batches]
    model.double()
    expected = torch.func.grad(lambda p: dense_loss(model, p, doubled))(moved)
    for name, path in names.items():
        torch.testing.assert_close(found[name].double(), expected[path], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert not any(shift.requires_grad for shift in shifts.values())


def test_a_shift_goes_away_and_leaves_the_weights(subject):
    clean, weights = mean_loss(subject, subject.batches), weights_of(subject)
    with shifted(subject, {name: torch.ones_like(weight) for name, weight in weights.items()}):
        assert mean_loss(subject, subject.batches) != clean
    assert mean_loss(subject, subject.batches) == clean
    assert all(torch.equal(now, weights[name]) for name, now in weights_of(subject).items())


def test_noise_has_the_deviation_asked_for():
    x = 3 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    for unit, expected in ((torch.tensor(2.0), 1.0), (None, 1.5)):
        added = Noise(0.5, unit, torch.Generator().manual_seed(1))(x) - x
        assert added.std().item() == pytest.approx(expected, rel=0.02)
        assert added.mean().item() == pytest.approx(0, abs=0.02)
    per_channel = Noise(1.0, torch.arange(1.0, 501.0), torch.Generator().manual_seed(1))(x) - x
    torch.testing.assert_close(per_channel.std(0) / torch.arange(1.0, 501.0), torch.ones(500), rtol=0, atol=0.25)


def test_noise_is_fresh_at_every_call():
    tap = Noise(1.0, None, torch.Generator().manual_seed(0))
    assert not torch.equal(tap(torch.ones(8)), tap(torch.ones(8)))


def test_gaussians_depend_on_seed_and_draw_and_place():
    weights = {"a": torch.zeros(40, 50), "b": torch.zeros(40, 50)}
    first = gaussians(weights, 0, 0)
    assert first["a"].std().item() == pytest.approx(1, rel=0.05)
    assert torch.equal(first["a"], gaussians({"other": weights["a"]}, 0, 0)["other"])
    others = [first["b"], gaussians(weights, 1, 0)["a"], gaussians(weights, 0, 1)["a"]]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([first["a"].flatten(), other.flatten()]))[0, 1]) < 0.1


def test_images_are_taken_from_all_batches(subject):
    assert chosen(subject, None) is subject.batches
    assert sum(len(y) for _, y in chosen(subject, 10)) == 10
    assert len(chosen(subject, 10)) == len(subject.batches)
    assert sum(len(y) for _, y in chosen(subject, 1000)) == subject.images
    with pytest.raises(PlanishError, match="0 images are too few"):
        chosen(subject, 0)


def test_rms_step_and_standard_error(subject):
    grid = next(iter(subject.grids("w4a4", activations=False).values()))
    step = step_of(grid)
    distances = grid(step * torch.linspace(-5, 5, 201))[0].unique().diff()
    torch.testing.assert_close(distances, step[0].flatten().expand(10))
    assert rms(torch.tensor([3.0, -4.0])).item() == pytest.approx(math.sqrt(12.5))
    assert standard_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error(torch.tensor([1.0])))


def test_an_unknown_scheme_is_an_error(subject):
    with pytest.raises(PlanishError, match="prepare the subject with it"):
        subject.grids("w5a5")
