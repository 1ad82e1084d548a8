"""The split of the loss: against quantizing by hand, its identities, and where it meets the Taylor formula."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.errors import PlanishError
from planish.flatness.split import split_loss
from planish.flatness.subject import Subject
from planish.network import detach
from planish.ptq import quantize
from planish.scheme import Scheme
from tests.flatness.networks import attention_net, conv_net, images

PARTS = ("weights", "activations", "interaction", "both")


def prepared(make, schemes=("w2a2",), count: int = 40) -> Subject:
    model = make()
    return Subject.prepare(model, images(model, count), list(schemes))


@torch.no_grad()
@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_the_parts_are_those_of_networks_rounded_by_hand(make):
    model = make()
    batches = images(model)
    subject = Subject.prepare(model, batches, ["w3a3"])
    found = split_loss(subject, "w3a3")
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    clean = F.cross_entropy(model(x), y)
    rounded = F.cross_entropy(quantize(model, [x for x, _ in batches], "w3a3")(x), y, reduction="none")
    increase = rounded - F.cross_entropy(model(x), y, reduction="none")
    assert found.loss == pytest.approx(clean.item(), rel=1e-4)
    assert found.both == pytest.approx(increase.mean().item(), rel=1e-3)
    assert found.error == pytest.approx(increase.std().item() / math.sqrt(len(y)), rel=1e-3)
    twin = copy.deepcopy(subject.model)
    detach(twin)
    for name, quantizer in subject.grids("w3a3", activations=False).items():
        weight = twin.get_parameter(name)
        before = weight.clone()
        weight.copy_(quantizer(weight))
        alone = F.cross_entropy(twin(x), y).item() - found.loss
        layer = next(p for p in found.layers if f"{name.rpartition('.')[0]}." in p.product)
        assert layer.weights == pytest.approx(alone, abs=1e-5)
        weight.copy_(before)


def test_the_interaction_is_predicted_too():
    """One linear layer, a little of the error: what both parts cost together beyond their sum is e_w^T H e_a."""
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    model = nn.Sequential(nn.Linear(6, 4))
    scheme = dataclasses.replace(Scheme.parse("w2a2"), edge_bits=None)
    subject = Subject.prepare(model, [(x, torch.arange(60) % 4)], [scheme])
    subject.quantizers["w2a2"] = {name: _Part(q, 0.03) for name, q in subject.quantizers["w2a2"].items()}
    found = split_loss(subject, "w2a2")
    assert abs(found.interaction) > 1e-6
    assert found.taylor_interaction == pytest.approx(found.interaction, rel=0.1)


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_they_add_up(make):
    subject = prepared(make)
    clean = subject.losses()
    found = split_loss(subject, "w2a2")
    assert torch.equal(subject.losses(), clean)
    assert [layer.product for layer in found.layers] == [p.name for p in subject.products]
    assert [layer.macs for layer in found.layers] == [p.macs for p in subject.products]
    for one in (found, *found.layers):
        assert one.interaction == pytest.approx(one.both - one.weights - one.activations, abs=1e-7)
        assert all(math.isfinite(value) for value in dataclasses.asdict(one).values() if isinstance(value, float))
    for layer in found.layers:
        if "attention" in layer.product:
            assert layer.weights == layer.interaction == layer.taylor_weights == 0
            assert layer.both == layer.activations != 0
    assert found.images == subject.images
    json.dumps(dataclasses.asdict(found))


class _Part(nn.Module):
    """A part of the way from x to Q(x)."""

    def __init__(self, quantizer: nn.Module, share: float) -> None:
        super().__init__()
        self.quantizer, self.share = quantizer, share

    def forward(self, x):
        return x + self.share * (self.quantizer(x) - x)


def test_the_formula_meets_the_loss_as_errors_shrink():
    """On a network without kinks what is missing falls with the third power of the error.

    Sites after another one see an error that moves with their input, so activations are compared product by product.
    """
    subject = prepared(attention_net)
    full = subject.quantizers["w2a2"]
    missing = []
    for share in (0.4, 0.2, 0.1):
        subject.quantizers["w2a2"] = {name: _Part(q, share) for name, q in full.items()}
        found = split_loss(subject, "w2a2", draws=0)
        pairs = [(found.weights, found.taylor_weights)]
        for layer in found.layers:
            pairs.append((layer.weights, layer.taylor_weights))
            pairs.append((layer.activations, layer.taylor_activations))
        missing.append(torch.tensor([abs(measured - predicted) for measured, predicted in pairs]).norm())
        scale = max(abs(predicted) for _, predicted in pairs)
    assert missing[1] < missing[0] / 6
    assert missing[2] < missing[1] / 5
    assert missing[2] < 0.02 * scale


def test_the_slope_is_a_part_of_the_prediction():
    """Twice the error: twice the slope, four times the second-order term."""
    subject = prepared(conv_net)
    full = subject.quantizers["w2a2"]
    whole = split_loss(subject, "w2a2", per_layer=False)
    subject.quantizers["w2a2"] = {name: _Part(q, 0.5) for name, q in full.items()}
    half = split_loss(subject, "w2a2", per_layer=False)
    for part in ("weights", "activations"):
        slope, total = (getattr(whole, f"{name}_{part}") for name in ("slope", "taylor"))
        assert getattr(half, f"slope_{part}") == pytest.approx(slope / 2, rel=1e-3)
        expected = slope / 2 + (total - slope) / 4
        assert getattr(half, f"taylor_{part}") == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert half.taylor_interaction == pytest.approx(whole.taylor_interaction / 4, rel=1e-2, abs=1e-6)
    assert whole.layers == []


def test_with_weights_alone_there_is_nothing_else():
    found = split_loss(prepared(attention_net, ["w2"]), "w2")
    assert found.activations == found.interaction == found.taylor_activations == found.taylor_interaction == 0
    assert found.both == found.weights != 0
    assert [layer.product for layer in found.layers] == ["embed.linear", "attn.qkv.linear", "attn.proj.linear",
                                                         "head.linear"]  # fmt: skip
    assert all(layer.both == layer.weights for layer in found.layers)


@pytest.mark.parametrize(("make", "passes"), [(conv_net, 3 * 3), (attention_net, 3 * 4 + 2)])
def test_what_is_not_asked_for_is_not_computed(make, passes):
    subject = prepared(make)
    calls = []
    subject.model.register_forward_hook(lambda *_: calls.append(1))
    found = split_loss(subject, "w2a2", taylor=False, per_layer=False)
    assert len(calls) == 4 * len(subject.batches)
    assert math.isnan(found.taylor_weights)
    assert math.isnan(found.taylor_interaction)
    calls.clear()
    told = []
    found = split_loss(subject, "w2a2", taylor=False, progress=told.append)
    assert len(calls) == (4 + passes) * len(subject.batches)
    assert all(math.isnan(layer.taylor_weights) and math.isnan(layer.taylor_activations) for layer in found.layers)
    assert told == sorted(told)
    assert told[-1] == 1


def test_seeds_repeat_and_draws_only_blur_the_layers():
    subject = prepared(attention_net)
    one, again, other = (split_loss(subject, "w2a2", draws=1, seed=seed) for seed in (3, 3, 4))
    exact = split_loss(subject, "w2a2", draws=0)
    assert one == again
    assert one.taylor_weights == other.taylor_weights == exact.taylor_weights
    assert one.layers != other.layers
    assert [layer.both for layer in one.layers] == [layer.both for layer in exact.layers]


def test_fewer_images():
    subject = prepared(conv_net)
    some = split_loss(subject, "w2a2", images=10, per_layer=False)
    assert some.images == 10
    assert some.loss == pytest.approx(subject.losses()[::4].mean().item(), rel=1e-6)
    one = split_loss(subject, "w2a2", images=1)
    assert one.images == 1
    assert math.isnan(one.error)
    assert math.isfinite(one.both)
    with pytest.raises(PlanishError, match="1 or more"):
        split_loss(subject, "w2a2", images=0)
    with pytest.raises(PlanishError, match="w8a8"):
        split_loss(subject, "w8a8")
