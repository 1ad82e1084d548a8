"""The methods: a name, a sentence, a source, and the list of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from planish.errors import PlanishError
from planish.ptq.bias import CorrectBias
from planish.ptq.compensation import BlockCompensation
from planish.ptq.equalize import Equalize
from planish.ptq.gptq import GPTQ
from planish.ptq.norm_tuning import PrepareNorms, TuneNorms
from planish.ptq.passes import Pass
from planish.ptq.reconstruction import Reconstruct
from planish.ptq.refine import RefineRanges
from planish.ptq.relu import ReplaceGELU
from planish.ptq.repq import RepQ
from planish.ptq.ridge import RidgeCorrection
from planish.ptq.rotate import Rotate
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round
from planish.ptq.rows import ScaleRows
from planish.ptq.splitting import SplitOutliers
from planish.ptq.statistics import MatchStatistics


@dataclass(frozen=True)
class Method:
    """A PTQ method: ``passes()`` makes its list anew, ready to be printed and edited."""

    name: str
    summary: str
    paper: str
    passes: Callable[[], list[Pass]]


def _reconstructed(**options: Any) -> Callable[[], list[Pass]]:
    return lambda: [FoldBatchNorm(), Calibrate(), Round(), Reconstruct(**options)]


APART: tuple[Pass, ...] = (Rotate(), ScaleRows(), SplitOutliers())  # each leaves alone what it has no place in


def _fast() -> list[Pass]:
    """Seconds to minutes, and no backpropagation."""
    ridge = RidgeCorrection(lam=None, robust=True)
    return [*APART, FoldBatchNorm(), Calibrate(), RefineRanges(), GPTQ(ridge=ridge, solver="halves")]


def _best_cnn() -> list[Pass]:
    return [FoldBatchNorm(), Calibrate(), Round(), Reconstruct(), TuneNorms()]


def _best_vit() -> list[Pass]:
    """After the rotation no norm has an affine map: every layer gets a factor and a shift instead."""
    return [*APART, FoldBatchNorm(), Calibrate(), Round(), Reconstruct(), TuneNorms(layers="all", held=0.25)]


METHODS = {
    method.name: method
    for method in (
        Method(
            "rtn",
            "calibrated rounding to nearest: fold BatchNorm, set activation ranges, round the weights",
            "Jacob et al. 2018, arXiv 1712.05877",
            lambda: [FoldBatchNorm(), Calibrate(), Round()],
        ),
        Method(
            "matched",
            "rtn, then mean and variance of every layer's output channels brought back to the float network's",
            "Hubara et al. 2020, arXiv 2006.10518",
            lambda: [FoldBatchNorm(), Calibrate(), Round(), MatchStatistics()],
        ),
        Method(
            "gptq",
            "columns of a weight are rounded in turn, the others make up for the error; no backpropagation",
            "Frantar et al. 2022, arXiv 2210.17323",
            lambda: [FoldBatchNorm(), Calibrate(), GPTQ()],
        ),
        Method(
            "erq",
            "a ridge regression fits the weights to the quantized inputs, then columns are rounded by halves",
            "Zhong et al. 2024, arXiv 2407.06794",
            lambda: [FoldBatchNorm(), Calibrate(), GPTQ(ridge=RidgeCorrection(), solver="halves")],
        ),
        Method(
            "qwt",
            "rtn, and one ridge regression beside every residual block, in float",
            "Fu et al. 2024, arXiv 2411.13918",
            lambda: [FoldBatchNorm(), Calibrate(), Round(), BlockCompensation()],
        ),
        Method(
            "dfq",
            "rtn with ranges of channels made equal across layers, and biases corrected",
            "Nagel et al. 2019, arXiv 1906.04721",
            lambda: [FoldBatchNorm(), Equalize(), Calibrate(), Round(), CorrectBias()],
        ),
        Method(
            "rotate",
            "rtn, after the residual stream and the heads were turned by random Hadamard matrices",
            "QuaRot, Ashkboos et al. 2024, arXiv 2404.00456",
            lambda: [Rotate(), FoldBatchNorm(), Calibrate(), Round()],
        ),
        Method(
            "repq",
            "rtn with ranges per channel after LayerNorm, folded into it and the next layers",
            "Li et al. 2023, arXiv 2212.08254",
            lambda: [RepQ(), FoldBatchNorm(), Calibrate(), Round()],
        ),
        Method(
            "relu",
            "rtn, after the GELU of every MLP was exchanged for a ReLU and the MLP fitted to what it gave",
            "APHQ-ViT, Wu et al. 2025, arXiv 2504.02508",
            lambda: [ReplaceGELU(), FoldBatchNorm(), Calibrate(), Round()],
        ),
        Method(
            "refine",
            "rtn with ranges of activations by the error of the product that they enter",
            "in the manner of Yuan et al. 2022, arXiv 2111.12293",
            lambda: [FoldBatchNorm(), Calibrate(), RefineRanges(), Round()],
        ),
        Method(
            "sandwich",
            "rtn, the affine maps of norms tuned by distillation before and after",
            "SandwichQuant, Xia and Pang 2026, arXiv 2608.24173",
            lambda: [PrepareNorms(), FoldBatchNorm(), Calibrate(), Round(), TuneNorms()],
        ),
        Method(
            "adaround",
            "roundings learned layer by layer",
            "Nagel et al. 2020, arXiv 2004.10568",
            _reconstructed(learner="adaround", drop=0.0, layers=1),
        ),
        Method(
            "brecq",
            "roundings learned block by block, errors weighted by squared gradients",
            "Li et al. 2021, arXiv 2102.05426",
            _reconstructed(learner="adaround", drop=0.0, loss="fisher"),
        ),
        Method(
            "qdrop",
            "roundings and activation steps learned block by block, activations left unrounded at random",
            "Wei et al. 2022, arXiv 2203.05740",
            _reconstructed(learner="adaround"),
        ),
        Method(
            "genie",
            "qdrop, and the scales of the weights are learned",
            "Jeon et al. 2023, arXiv 2212.04780",
            _reconstructed(),
        ),
        Method(
            "pd-quant",
            "genie, and the logits behind a block are compared, too",
            "Liu et al. 2023, arXiv 2212.07048",
            _reconstructed(loss="pd"),
        ),
        Method(
            "ls-vit",
            "genie, errors weighted by a least-squares diagonal Hessian",
            "LS-ViT, CVPR 2026",
            _reconstructed(loss="lsh"),
        ),
        Method(
            "glf",
            "weights and scales learned straight through, block by block, by the features before the classifier",
            "GLF-Q, Sun et al. 2026",
            _reconstructed(learner="ste", loss="glf"),
        ),
        Method(
            "signround",
            "roundings and clips learned block by block by signs of gradients",
            "Cheng et al. 2023, arXiv 2309.05516",
            _reconstructed(learner="signround", drop=0.0),
        ),
        Method(
            "fast",
            "erq with a ridge for each layer, on a rotated network whose outliers are taken apart; no backpropagation",
            "docs/methods.md",
            _fast,
        ),
        Method(
            "best-cnn",
            "genie, and the factors and shifts of channels tuned afterwards",
            "docs/methods.md",
            _best_cnn,
        ),
        Method("best-vit", "best-cnn on a rotated network, its outliers taken apart", "docs/methods.md", _best_vit),
    )
}


def with_settings(passes: Iterable[Pass], **settings: Any) -> list[Pass]:
    """The passes with some options set, each in those passes that have it; ``None`` leaves an option as it is.

    >>> with_settings(get_method("qdrop").passes(), iterations=200, seed=1)
    """
    changed: list[Pass] = []
    for step in passes:
        known: list[str] = [field.name for field in fields(step)] if is_dataclass(step) else []
        mine = {name: value for name, value in settings.items() if name in known and value is not None}
        changed.append(replace(step, **mine) if mine else step)  # type: ignore[type-var]
    return changed


def get_method(name: str) -> Method:
    """The method called ``name``; raises :class:`PlanishError` with the names that exist."""
    if name not in METHODS:
        raise PlanishError(
            f"method {name!r} is not known: choose one of {', '.join(METHODS)} (those that train the quantized network "
            "are for planish train)"
        )
    return METHODS[name]
