"""A scale of its own for the softmax output of each head."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planish.ptq.exactness import require_float
from planish.ptq.passes import Calibration


@dataclass(frozen=True)
class ScaleHeads:
    """Give the softmax output of every head its own scale.

    One head looks at a few places, another at all of them: their largest probabilities differ by factors of ten and
    more, and with one scale at few bits either the first is cut or the second becomes zero. A head is a matrix product
    of its own, so its scale is applied after the sum, and integer kernels stay what they are. Published methods for
    vision transformers have one scale, a logarithmic grid (RepQ-ViT, arXiv 2212.08254), or a scale for each row
    (FIMA-Q, arXiv 2506.11543). Before ``Calibrate``; attention that is spelled out in the network as two plain products
    cannot be told from others and keeps one scale.

    Raises:
        PlanishError: the network has taps already.
    """

    name = "scale-heads"

    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        scheme = calibration.assignment.scheme
        calibration.plan_anew(replace(scheme, heads=True))
        formats = [fmt for site, fmt in calibration.assignment.quantized() if not site.is_weight]
        if not any(fmt.granularity == "channel" for fmt in formats):
            calibration.plan_anew(scheme)
            calibration.note(self.name, "no attention with heads and a quantized softmax output was found")
