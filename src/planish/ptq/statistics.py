"""Batch-normalization tuning for networks whose BatchNorm is folded: mean and variance of every output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.ptq.outputs import Layer, Moments, change_layers, change_outputs
from planish.ptq.passes import Calibration
from planish.ptq.walk import check_memory


def matching_affine(exact: Moments, now: Moments, limit: float) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel, (C,) each, that give ``now`` the mean and variance of ``exact``.

    The factor is kept in [1 / limit, limit]; it is 1 for a channel that is constant in one of the networks.
    """
    before, after = now.variance.sqrt(), exact.variance.sqrt()
    constant = (before <= 1e-6 * before.max()) | (after <= 1e-6 * after.max())
    factor = torch.where(constant, 1.0, after / before).clamp(1 / limit, limit)
    return factor, exact.mean - factor * now.mean


@dataclass(frozen=True)
class MatchStatistics:
    """Mean and variance of every output channel are brought back to the float network's, after ``Round``.

    This is what re-estimating BatchNorm statistics does in a quantized network (batch-normalization tuning, Hubara et
    al. 2020, arXiv 2006.10518). Once BatchNorm is folded no statistics are left to re-estimate, so the layer's output
    itself gets a factor and a shift for each channel: the factor goes into the scale of the weight's grid, where the
    grid has one for each channel, so the integers stay; the shift goes into the bias. Layers come in the order of
    execution, each in the network as it is quantized so far. Where a grid is shared by channels only the mean is
    matched.

    Attributes:
        limit: a factor stays in [1 / limit, limit].
        memory: gigabytes of outputs of blocks that are held in memory; beyond it, in temporary files.

    Raises:
        PlanishError: an option is out of range, or an earlier pass has changed the float weights and no ``KeepFloat``
            came before it.
    """

    limit: float = 4.0
    memory: float = 4.0
    name = "match-statistics"

    def __post_init__(self) -> None:
        check_memory(self.name, self.memory)
        if not self.limit >= 1:
            raise PlanishError(f"limit is {self.limit}: factors stay in [1 / limit, limit], so give at least 1.")

    def __call__(self, calibration: Calibration) -> None:
        whole = 0

        def match(layer: Layer, exact: Moments, now: Moments) -> None:
            nonlocal whole
            if layer.tap is None:
                change_outputs(layer, None, exact.mean - now.mean)
            else:
                change_outputs(layer, *matching_affine(exact, now, self.limit))
                whole += 1

        found = change_layers(calibration, match, memory=self.memory)
        text = f"mean and variance of {whole} layers and the mean of {found - whole} more were matched"
        calibration.note(self.name, text)
