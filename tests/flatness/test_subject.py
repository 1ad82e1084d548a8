"""The network as its quantizer sees it: exact in float, exact when rounded, and switchable site by site."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.errors import PlanishError
from planish.flatness.subject import Subject
from planish.ptq import quantize
from tests.flatness.networks import attention_net, conv_net, images


@pytest.fixture(params=[conv_net, attention_net])
def model(request) -> nn.Module:
    return request.param()


def test_without_taps_it_is_the_given_network(model):
    batches = images(model)
    subject = Subject.prepare(model, batches, ["w4a4"])
    with torch.no_grad():
        expected = torch.cat([model(x) for x, _ in batches])
    torch.testing.assert_close(subject.logits(), expected, rtol=1e-4, atol=1e-5)
    labels = torch.cat([y for _, y in batches])
    torch.testing.assert_close(subject.losses().mean(), F.cross_entropy(expected, labels), rtol=1e-4, atol=1e-5)
    assert subject.images == len(labels)
    assert subject.labelled


def test_with_all_quantizers_it_is_the_rounded_network(model):
    batches = images(model)
    subject = Subject.prepare(model, batches, ["w8a8", "w3a3"])
    for scheme in ("w3a3", "w8a8"):
        rounded = quantize(model, [x for x, _ in batches], scheme)
        with torch.no_grad(), subject.tapped(subject.quantizers[scheme]):
            assert torch.equal(subject.logits(), torch.cat([rounded(x) for x, _ in batches]))


def test_taps_nest_and_go_away_again(model):
    subject = Subject.prepare(model, images(model), ["w2a2"])
    clean = subject.logits()
    weights, activations = subject.grids("w2a2", activations=False), subject.grids("w2a2", weights=False)
    assert weights
    assert activations
    assert {**weights, **activations} == subject.quantizers["w2a2"]
    with subject.tapped(weights):
        only_weights = subject.logits()
        with subject.tapped(activations):
            both = subject.logits()
        assert torch.equal(subject.logits(), only_weights)
    assert torch.equal(subject.logits(), clean)
    assert not torch.equal(only_weights, clean)
    assert not torch.equal(both, only_weights)


def _fail_inside(subject: Subject) -> None:
    with subject.tapped(subject.quantizers["w2a2"]):
        raise RuntimeError("on the way")


def test_taps_go_away_when_something_fails(model):
    subject = Subject.prepare(model, images(model), ["w2a2"])
    clean = subject.logits()
    with pytest.raises(RuntimeError, match="on the way"):
        _fail_inside(subject)
    assert torch.equal(subject.logits(), clean)


def test_without_labels_the_network_answers_itself(model):
    subject = Subject.prepare(model, [x for x, _ in images(model)], ["w4a4"])
    assert not subject.labelled
    assert torch.equal(torch.cat([y for _, y in subject.batches]), subject.logits().argmax(-1))


def test_the_given_network_is_untouched(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    subject = Subject.prepare(model, images(model), ["w4a4"])
    with subject.tapped(subject.quantizers["w4a4"]):
        subject.logits()
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nothing_to_look_at_is_an_error(model):
    with pytest.raises(PlanishError, match="at least one batch"):
        Subject.prepare(model, [], ["w4a4"])
    with pytest.raises(PlanishError, match="one scheme"):
        Subject.prepare(model, images(model), [])
