"""A prediction is the imitation, scaled by the fitted relation, with the scatter as its error bar."""

from __future__ import annotations

import math

import pytest

from planish.flatness.imitation import Imitation, imitate
from planish.flatness.prediction import FITTED, Calibration, from_imitation, predict
from planish.flatness.subject import Subject
from planish.task import CLASSES
from tests.flatness.networks import attention_net, conv_net, images

AS_IT_IS = Calibration(0.0, 1.0, 0.0, "nothing fitted")


def seen(divergence: float, top1: float, loss: float = 1.0) -> Imitation:
    return Imitation("w3a3", divergence, loss, top1, 0.0)


def test_without_a_correction_it_says_what_the_imitation_says():
    found = from_imitation(seen(0.3, 0.6, 1.2), 0.5, 0.8, 100_000, 0.9, AS_IT_IS)
    assert found.top1 == pytest.approx(0.9 * 0.6 / 0.8, rel=1e-4)
    assert found.loss == pytest.approx(1.2)
    assert found.divergence == pytest.approx(0.3)
    assert found.low < found.top1 < found.high
    assert found.high - found.low < 0.01  # only the sampling of 100,000 images is left


def test_twice_the_divergence_is_twice_the_exponent():
    double = Calibration(math.log(2), 1.0, 0.0, "")
    found = from_imitation(seen(0.3, 0.6, 1.2), 0.5, 0.8, 100_000, 0.9, double)
    assert found.top1 == pytest.approx(0.9 * (0.6 / 0.8) ** 2, rel=1e-4)
    assert found.loss == pytest.approx(0.5 + 2 * 0.7)


def test_the_interval_widens_with_the_scatter_and_with_fewer_images():
    def width(spread: float, count: int) -> float:
        found = from_imitation(seen(0.3, 0.6), 0.5, 0.8, count, 0.9, Calibration(0.0, 1.0, spread, ""))
        return found.high - found.low

    assert width(0.1, 1000) < width(0.3, 1000) < width(0.3, 50)


@pytest.mark.parametrize(("divergence", "top1"), [(0.0, 0.8), (1e-9, 0.81), (20.0, 0.0), (3.0, 0.1)])
def test_the_ends_stay_rates(divergence, top1):
    for clean in (0.8, 0.0):
        found = from_imitation(seen(divergence, top1), 0.5, clean, 50, 0.9, FITTED)
        assert 0 <= found.low <= found.top1 <= found.high <= 1
        assert math.isfinite(found.loss)


@pytest.mark.parametrize("build", [conv_net, attention_net])
def test_it_is_made_of_the_imitation_and_orders_schemes_as_rounding_does(build):
    model = build()
    schemes = ["w8a8", "w4a4", "w2a2"]
    subject = Subject.prepare(model, images(model, count=200, batch=50), schemes)
    found = [predict(subject, scheme, 0.9, draws=4) for scheme in schemes]
    reference, real = subject.logits(), []
    for scheme in schemes:
        with subject.tapped(subject.quantizers[scheme]):
            real.append(CLASSES.exact(reference, subject.logits()).mean().item())
    assert [p.divergence for p in found] == sorted(p.divergence for p in found)
    assert real == sorted(real)
    assert found[0].top1 > found[2].top1
    assert found[0].top1 == pytest.approx(0.9, abs=0.02)
    plain = predict(subject, "w4a4", 0.9, draws=4, calibration=AS_IT_IS)
    assert plain.divergence == pytest.approx(imitate(subject, "w4a4", draws=4).divergence)
