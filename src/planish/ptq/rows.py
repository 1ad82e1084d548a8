"""Each row of the softmax output in units of its largest value."""

from __future__ import annotations

from dataclasses import dataclass

from planish.network.rows import divide_rows
from planish.ptq.exactness import require_float
from planish.ptq.passes import Calibration


@dataclass(frozen=True)
class ScaleRows:
    """Divide each row of the softmax output by its largest value before it is rounded, and multiply after the product.

    One query looks at a single place, another at all of them, and with a few bits no scale that they share fits both.
    Divided by its largest value every row reaches from 0 to 1 whatever the image, so that one scale, set once, fits all
    rows of all heads. It costs the largest value of each row and a multiplication of what attention gives; the product
    with the values is in integers as before. Kernels that never divide by the sum have the same values for nothing:
    before that division the largest exponential of a row is 1 (SageAttention, Zhang et al. 2024, arXiv 2410.02367,
    rounds them to 8 bits with the scale 1 / 127). The outputs in float stay what they were. Before ``Calibrate``;
    attention that is spelled out in the network as two plain products cannot be told from others and stays as it is.

    Raises:
        PlanishError: the network has taps already.
    """

    name = "scale-rows"

    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        rounded = {site.name for site, _ in calibration.assignment.quantized()}
        paths = [
            product.module
            for product in calibration.assignment.products
            if product.operator == "attention_av" and product.sites[0].name in rounded
        ]
        if not divide_rows(calibration.model, list(dict.fromkeys(paths))):
            calibration.note(self.name, "no attention with a quantized softmax output was found")
            return
        calibration.plan_anew()
