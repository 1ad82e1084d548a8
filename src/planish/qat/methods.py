"""The training methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planish.errors import PlanishError
from planish.qat.cr import CR
from planish.qat.dampening import Dampen, Freeze
from planish.qat.ewgs import EWGS
from planish.qat.fpq import FPQ
from planish.qat.gplq import GPLQ
from planish.qat.mec import MEC
from planish.qat.method import Method
from planish.qat.ofq import OFQ
from planish.qat.saq import SAQ


@dataclass(frozen=True)
class LSQPlus(Method):
    """LSQ+: the zero points of activations are learned, too."""

    name: ClassVar[str] = "lsq+"
    summary: ClassVar[str] = "learned step sizes and zero points"
    paper: ClassVar[str] = "Bhalgat et al. 2020, arXiv 2004.09576"

    activations: str = "lsq+"


@dataclass(frozen=True)
class PACT(Method):
    """PACT's clipping of activations with DoReFa's weights, as the papers that compare with it have it."""

    name: ClassVar[str] = "pact"
    summary: ClassVar[str] = "learned clipping of activations, weights squashed by tanh"
    paper: ClassVar[str] = "Choi et al. 2018, arXiv 1805.06085"

    weights: str = "dorefa"
    activations: str = "pact"


@dataclass(frozen=True)
class DoReFa(Method):
    """DoReFa's weights over calibrated ranges of activations that stay as they are."""

    name: ClassVar[str] = "dorefa"
    summary: ClassVar[str] = "weights squashed by tanh, ranges of activations fixed"
    paper: ClassVar[str] = "Zhou et al. 2016, arXiv 1606.06160"

    weights: str = "dorefa"
    activations: str = "fixed"


@dataclass(frozen=True)
class KD(Method):
    """LSQ with distillation from the float network's logits."""

    name: ClassVar[str] = "kd"
    summary: ClassVar[str] = "lsq, and the logits of the float network beside the labels"
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"

    distillation: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True)
class BestQAT(FPQ):
    """What did best in this project's own runs (docs/training.md)."""

    name: ClassVar[str] = "best-qat"
    summary: ClassVar[str] = "the one that did best here: fpq as it is by default"
    paper: ClassVar[str] = "docs/training.md"


METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Method, LSQPlus, PACT, DoReFa, KD, FPQ, CR, MEC, OFQ, Dampen, Freeze, EWGS, SAQ, GPLQ, BestQAT)
}


def get_method(name: str) -> Method:
    """The method called ``name`` with its default options; :class:`PlanishError` with the names that exist."""
    if name not in METHODS:
        raise PlanishError(f"training method {name!r} is not known: choose one of {', '.join(METHODS)}")
    return METHODS[name]()
