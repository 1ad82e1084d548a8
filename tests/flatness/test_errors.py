"""The error model as a whole."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from planish.errors import PlanishError
from planish.flatness.errors import error_model
from planish.flatness.subject import Subject
from tests.flatness.networks import attention_net, conv_net, images


@pytest.mark.parametrize("make", [conv_net, attention_net])
def test_it_has_every_site_and_can_be_written_down(make):
    model = make()
    subject = Subject.prepare(model, images(model), ["w4a4"])
    found = error_model(subject, "w4a4", images=20)
    assert found.images == 20
    assert [s.site for s in found.sites] == [s.name for s in subject.sites]
    assert {s.verdict for s in found.sites} <= {"gaussian", "uniform", "clipped", "degenerate"}
    assert {s.bits for s in found.sites} == {4, 8}
    written = json.loads(json.dumps(dataclasses.asdict(found)))
    assert written["correlations"].keys() >= {"weight_activation", "channels", "layers"}
    assert error_model(subject, "w4a4", images=20).correlations == found.correlations


def test_at_many_bits_the_variance_is_a_twelfth_of_the_squared_step():
    model = conv_net()
    subject = Subject.prepare(model, images(model), ["w8a8"])
    weights = [s for s in error_model(subject, "w8a8").sites if s.role == "weight" and s.count > 300]
    assert weights
    for site in weights:
        assert site.variance_ratio == pytest.approx(1, abs=0.15)
        assert site.verdict == "uniform"
        assert site.kurtosis == pytest.approx(-1.2, abs=0.3)


def test_one_image_and_unknown_schemes():
    model = attention_net()
    subject = Subject.prepare(model, images(model, 1), ["w4a4"])
    assert error_model(subject, "w4a4").images == 1
    with pytest.raises(PlanishError, match="w2a2"):
        error_model(subject, "w2a2")
    with pytest.raises(PlanishError, match="1 or more"):
        error_model(subject, "w4a4", images=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same():
    model = conv_net()
    batches = images(model)
    here = error_model(Subject.prepare(model, batches, ["w4a4"]), "w4a4")
    there = error_model(Subject.prepare(model.cuda(), batches, ["w4a4"]), "w4a4")
    for a, b in zip(here.sites, there.sites, strict=True):
        assert b.variance == pytest.approx(a.variance, rel=1e-2)
        assert b.verdict == a.verdict
    assert there.correlations.layers.value == pytest.approx(here.correlations.layers.value, rel=1e-2)
