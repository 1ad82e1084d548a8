"""What one rounded tensor costs: measured against doing it by hand, estimated against exact expectations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.network import taps_of, watch
from planish.network.batches import call_model, first_image, logits_of, size_of
from planish.ptq.sensitivity import every_nth, fisher_losses, measured_losses
from planish.quantizers import UniformQuantizer
from planish.scheme import Format
from planish.task import CLASSES
from tests.network.zoo import build


def test_the_divergence_is_that_of_pytorch():
    a, b = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).mul(3).split([3, 4], 1)
    a, b = a.repeat(1, 4)[:, :4], b
    expected = F.kl_div(b.double().log_softmax(1), a.double().log_softmax(1), reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(CLASSES.exact(a, b), expected)
    assert CLASSES.exact(a, a).max() == 0
    assert (CLASSES.exact(a, a + 5) < 1e-12).all()  # the same prediction


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_gray_28", "test_resnet", "twice"])
def test_measured_is_what_rounding_one_weight_by_hand_gives(name):
    model, example = build(name)
    before = copy.deepcopy(model)
    products = watch(model, first_image(example)).products
    sites = {s.name: s for p in products for s in p.sites if s.is_weight}
    sites = {name: sites[name] for name in list(sites)[1:4]}
    tried = [
        {s.name: UniformQuantizer(Format(bits, "channel")).fit(model.get_submodule(s.owner).weight)}
        for s in sites.values()
        for bits in (2, 4)
    ]
    losses = measured_losses(model, products, [example, example], tried)
    for trial, loss in zip(tried, losses, strict=True):
        twin = copy.deepcopy(before)
        for where, quantizer in trial.items():
            weight = twin.get_submodule(sites[where].owner).weight
            weight.copy_(quantizer(weight))
        expected = CLASSES.exact(logits_of(call_model(before, example)), logits_of(call_model(twin, example))).mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    assert all(coarse > fine > 0 for coarse, fine in zip(losses[::2], losses[1::2], strict=True))
    assert not list(taps_of(model))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def head():
    """A linear classifier, of which every expectation has a closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    model[0].weight.mul_(2)
    return model, torch.randn(24, 6)


def test_fisher_is_the_expected_square_of_the_gradient():
    """logits W x: diag F of W[c, j] is p_c (1 - p_c) x_j^2, and of x_j the variance of W[y, j] over y ~ p."""
    model, x = head()
    weight, p = model[0].weight, model(x).softmax(1)
    of_weight = UniformQuantizer(Format(3, "channel")).fit(weight)
    of_input = UniformQuantizer(Format(3, symmetric=False)).fit(x)
    products = watch(model, x[:1]).products
    tried = {"0.weight": {3: of_weight}, "0.input": {3: of_input}}
    found = fisher_losses(model, products, [x[:16], x[16:]], tried, draws=400)
    error = (of_weight(weight) - weight).square()
    diagonal = ((p * (1 - p))[:, :, None] * x.square()[:, None, :]).mean(0)
    assert found["0.weight"][3] == pytest.approx(0.5 * float((diagonal * error).sum()), rel=0.08)
    variance = p @ weight.square() - (p @ weight).square()
    expected = 0.5 * float((variance * (of_input(x) - x).square()).sum(1).mean())
    assert found["0.input"][3] == pytest.approx(expected, rel=0.08)
    assert not list(taps_of(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fisher_predicts_the_divergence_of_one_small_error():
    """With one element rounded there is nothing beside the diagonal."""
    model, x = head()

    class Nudge(nn.Module):
        def forward(self, w):
            w = w.clone()
            w[1, 2] += 0.02
            return w

    products = watch(model, x[:1]).products
    measured = measured_losses(model, products, [x], [{"0.weight": Nudge()}])[0]
    found = fisher_losses(model, products, [x], {"0.weight": {0: Nudge()}}, draws=400)["0.weight"][0]
    assert found == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("name", ["einsum", "torchvision_vit", "hf_vit_sdpa", "twice", "encoder"])
def test_both_run_on_any_model(name):
    model, example = build(name)
    model.requires_grad_(False)
    plan = watch(model, first_image(example))
    tried = {site.name: {4: _Coarse()} for site in plan.sites}
    fisher = fisher_losses(model, plan.products, [example], tried, draws=2)
    measured = measured_losses(model, plan.products, [example], [{name: _Coarse()} for name in tried])
    assert all(values[4] > 0 for values in fisher.values())
    assert all(loss > 0 for loss in measured)
    again = fisher_losses(model, plan.products, [example], tried, draws=2)
    assert again == fisher
    assert fisher_losses(model, plan.products, [example], tried, draws=2, seed=1) != fisher


class _Coarse(nn.Module):
    def forward(self, x):
        return (16 * x).round() / 16 + 0.01


def test_images_are_taken_evenly():
    batches = [torch.arange(10), torch.arange(10, 12), torch.arange(12, 25)]
    assert [b.tolist() for b in every_nth(batches, 7)] == [[0, 4, 8], [12, 16, 20, 24]]
    assert sum(map(size_of, every_nth(batches, 100))) == 25
    for images in range(1, 26):
        flat = torch.cat(every_nth(batches, images))
        assert len(flat) <= images
        assert len(set(flat.diff().tolist())) <= 1
    assert [b["x"].tolist() for b in every_nth([{"x": torch.arange(6)}], 3)] == [[0, 2, 4]]
