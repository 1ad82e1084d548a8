"""Starts that are quantized already: what each method can take over from them, and what it refuses."""

import pytest
import torch

from planish.errors import PlanishError
from planish.network import reestimate_batchnorm, taps_of
from planish.network.rebuilding import has_turned_channels, rebuild, rebuilt
from planish.ptq import Calibrate, Round, quantize
from planish.ptq.rotate import Rotate
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.fpq import FPQ
from planish.qat.gplq import GPLQ
from planish.qat.mec import MEC
from planish.qat.methods import KD
from planish.qat.ofq import OFQ
from planish.quantizers import ShiftedLearnedQuantizer
from tests.training import tiny

STILL = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=1e-9))
SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1))


def images(size=8):
    return [x for x, _ in tiny.loader(n=64, batch=32, size=size)]


def upside_down():
    """A network whose norms have negative scales: folded, they turn the sign of a convolution's channels."""
    model = tiny.conv()
    for norm in (model[1], model[5]):
        torch.nn.init.constant_(norm.weight, -0.5)
        torch.nn.init.constant_(norm.bias, 0.5)
    reestimate_batchnorm(model.eval(), images())
    return model


def losses(start, given, method, scheme="w8a8", size=8, settings=STILL):
    seen = []
    train_quantized(
        start, tiny.loader(n=64, batch=32, size=size), scheme, method, given=given, settings=settings,
        progress=lambda step, steps, loss: seen.append(loss),
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("frozen", [False, True])
def test_a_folded_start_is_compared_with_the_channels_of_a_folded_network(frozen):
    """At 8 bits the distance is near 0; that of a channel with the wrong sign would be 4."""
    given = upside_down()
    start = quantize(given, images(), "w8a8", "rtn")
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=1, lr=1e-9, freeze_batchnorm=frozen))
    assert max(losses(start, given, FPQ(p=0.0, csd=1.0, task=0.0), settings=settings)) < 0.1


@pytest.mark.parametrize("rotate", [Rotate(), Rotate(stream=False)])
@pytest.mark.parametrize("method", [FPQ(), MEC(), GPLQ()])
def test_a_rotated_start_has_no_channels_to_compare(rotate, method):
    given = tiny.vit()
    start = quantize(given, images(16), "w8a8", [rotate, Calibrate(), Round()])
    with pytest.raises(PlanishError, match=rf"{method.name} compares .* the start was rotated .* train by kd"):
        losses(start, given, method, size=16)
    assert len(losses(start, given, KD(), size=16)) == 2
    assert len(losses(start, start, method, size=16)) == 2  # rotated alike


def test_maps_beside_the_blocks_are_no_hindrance():
    """Block compensation adds layers that the network in float has not."""
    given = tiny.vit()
    start = quantize(given, images(16), "w4a4", "qwt")
    assert len(losses(start, given, MEC(), scheme="w4a4", size=16)) == 2


def test_a_file_says_that_channels_were_turned():
    start = quantize(tiny.vit(), images(16), "w8a8", [Rotate(stream=False), Calibrate(), Round()])
    assert has_turned_channels(start)
    again = tiny.vit()
    rebuild(again, rebuilt(start))
    assert has_turned_channels(again)
    assert tiny.same(again, tiny.vit())  # a note and nothing else
    assert not has_turned_channels(quantize(tiny.vit(), images(16), "w8a8", "rtn"))


@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
def test_ofq_goes_on_from_its_own_shifts(make, size):
    batches = tiny.loader(n=64, batch=32, size=size)
    settings = QATSettings(averaging=None, training=tiny.settings(epochs=4, optimizer="adamw", lr=0.01))
    start = train_quantized(make(), batches, "w2a2", OFQ(), settings=settings)
    taps = [m for m in start.modules() if hasattr(m, "before")]
    assert any(tap.before.any() for tap in taps)
    assert any(tap.after.any() for tap in taps)
    still = train_quantized(start, batches, "w2a2", OFQ(), settings=settings, epochs=0)
    x = torch.randn(8, 1, size, size)
    torch.testing.assert_close(still(x), start(x))
    with pytest.raises(PlanishError, match=r"has learned shifts .* which lsq has no place for: train it by ofq"):
        train_quantized(start, batches, "w2a2", Method(), settings=settings)


def test_ofq_refuses_two_weights_that_it_would_train_as_one():
    batches = tiny.loader(size=16)
    start = quantize(tiny.vit(), images(16), "w2a2", "rtn")
    with pytest.raises(PlanishError, match=r"blocks\.0\.attn: ofq trains one weight .* set query_key to False"):
        train_quantized(start, batches, "w2a2", OFQ(), settings=SETTINGS)
    trained = train_quantized(start, batches, "w2a2", OFQ(query_key=False), settings=SETTINGS)
    assert any("attention_qk" in name for name, _ in taps_of(trained))


def test_advice_is_given_that_can_be_followed():
    """No notation of a scheme gives the half-integer grids of StatsQ at 4 bits."""
    start = quantize(tiny.conv(), images(), "w4a4", "rtn")
    with pytest.raises(PlanishError, match=r"would train it by w4a4: .* 8 bits: start from the network in float"):
        train_quantized(start, tiny.loader(), "w4a4", OFQ(), settings=SETTINGS)
    with pytest.raises(PlanishError, match=r"would train it by w2a4: .* 8 bits: quantize it with that scheme, or"):
        train_quantized(start, tiny.loader(), "w2a4", Method(), settings=SETTINGS)


def test_a_start_without_shifts_begins_with_none():
    start = quantize(tiny.conv(), images(), "w2a2", "rtn")
    seen = []

    class Look(KD):
        def ingredients(self, context):
            seen.extend(tap for tap in context.taps.values() if isinstance(tap, ShiftedLearnedQuantizer))
            assert not any(tap.before.any() or tap.after.any() for tap in seen)
            return super().ingredients(context)

    train_quantized(start, tiny.loader(), "w2a2", Look(activations="shifted"), settings=SETTINGS)
    assert seen
    assert any(tap.before.any() for tap in seen)  # and learns them
