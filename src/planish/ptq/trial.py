"""A throw-away copy of the network, rounded to nearest: what passes that change the float network judge by."""

from __future__ import annotations

import copy
from dataclasses import replace

from planish.network import fold_batchnorm
from planish.ptq.passes import Calibration
from planish.ptq.rounding import Calibrate, Round


def rounded_copy(calibration: Calibration) -> tuple[Calibration, dict[str, str]]:
    """The copy, and the BatchNorm that was folded into each layer, by their paths; the network must have no taps."""
    trial = replace(calibration, model=copy.deepcopy(calibration.model), log=[], float_twin=None)
    pairs = dict(fold_batchnorm(trial.model, trial.batches[0]))
    Calibrate()(trial)
    Round()(trial)
    return trial, pairs
