"""The methods: a name, a sentence, a source, and the list of passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planish.errors import PlanishError
from planish.ptq.passes import Pass
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round


@dataclass(frozen=True)
class Method:
    """A PTQ method: ``passes()`` makes its list anew, ready to be printed and edited."""

    name: str
    summary: str
    paper: str
    passes: Callable[[], list[Pass]]


METHODS = {
    method.name: method
    for method in (
        Method(
            "rtn",
            "calibrated rounding to nearest: fold BatchNorm, set activation ranges, round the weights",
            "Jacob et al. 2018, arXiv 1712.05877",
            lambda: [FoldBatchNorm(), Calibrate(), Round()],
        ),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``; raises :class:`PlanishError` with the names that exist."""
    if name not in METHODS:
        raise PlanishError(f"method {name!r} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name]
