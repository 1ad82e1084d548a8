"""Constants in half precision, for a small file that computes exactly what was measured."""

from __future__ import annotations

from planish.network.half import round_constants
from planish.ptq.passes import Calibration


class HalveConstants:
    """Round biases, norms, position embeddings and the scales of grids to half precision: the last pass of a list.

    The codes of the weights stay. An exported file can then hold these constants in half precision
    (``planish.export(constants="half")``) and computes the network as it is, to the bit.
    """

    name = "halve-constants"

    def __call__(self, calibration: Calibration) -> None:
        changed = round_constants(calibration.model, calibration.assignment)
        calibration.note(self.name, f"{changed} tensors were rounded to half precision")
