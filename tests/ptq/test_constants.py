"""HalveConstants as the last pass of a list."""

import torch

from planish.network.half import LEAST
from planish.ptq.constants import HalveConstants
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round
from planish.recipes.config import QuantizeOptions
from planish.recipes.passes import chosen_passes
from tests.ptq.work import network, notes, work

torch.set_num_threads(1)
RTN = (FoldBatchNorm(), Calibrate(), Round())


def test_scales_and_biases_are_of_half_precision_and_the_log_says_how_many():
    model, batches = network("vit")
    ours = work(model, batches, "w4a4", [*RTN, HalveConstants()])
    for name, value in ours.model.state_dict().items():
        if (name.endswith("bias") or name.endswith("scale")) and value.numel() >= LEAST:
            assert torch.equal(value, value.half().float()), name
    assert notes(ours)[-1].endswith("tensors were rounded to half precision")
    assert int(notes(ours)[-1].split()[0]) > 5
    plain, outputs = work(model, batches, "w4a4", RTN), []
    with torch.no_grad():
        for calibration in (plain, ours):
            outputs.append(calibration.model(batches[0]))
    assert 0 < float((outputs[0] - outputs[1]).abs().max()) < 0.05 * float(outputs[0].std())


def test_it_is_the_last_pass_where_it_is_wanted():
    names = [step.name for step in chosen_passes("rtn", QuantizeOptions(constants="half"), 0)]
    assert names == ["fold-batchnorm", "calibrate", "round", "halve-constants"]
    assert "halve-constants" not in [step.name for step in chosen_passes("rtn", QuantizeOptions(), 0)]
