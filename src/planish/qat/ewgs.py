"""EWGS: gradients are longer where they lead a value back to its level than where they lead it away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.qat.method import Method


@dataclass(frozen=True)
class EWGS(Method):
    """LSQ with element-wise gradient scaling, on weights and activations; see ``planish.quantizers.learned_quantize``.

    ``pull`` counts in steps of the grid: with n levels it is ``delta / (n - 1)`` of the paper, whose values lie in
    [0, 1]. The paper adapts delta to the Hessian's trace from epoch to epoch; here it is fixed.
    """

    name: ClassVar[str] = "ewgs"
    summary: ClassVar[str] = "gradients scaled by where a value lies between its levels"
    paper: ClassVar[str] = "Lee et al. 2021, arXiv 2104.00903"

    pull: float = 0.02
