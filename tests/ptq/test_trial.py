"""The throw-away copy is what rtn gives, and the network stays in float."""

import torch

from planish.network import taps_of
from planish.ptq import quantize
from planish.ptq.trial import rounded_copy
from tests.ptq.work import network, same, state, work


@torch.no_grad()
def test_the_copy_is_rounded_and_the_network_is_not():
    model, batches = network("conv")
    calibration = work(model, batches, "w3a4")
    before = state(calibration.model)
    trial, pairs = rounded_copy(calibration)
    assert pairs == {"0": "1", "4": "5"}
    assert torch.equal(trial.model(batches[0]), quantize(model, batches, "w3a4")(batches[0]))
    assert same(state(calibration.model), before)
    assert not any(True for _ in taps_of(calibration.model))
    assert calibration.log == []
