"""How much a network will lose by rounding, told from the imitation of rounding, with an error bar.

The imitation (imitation.py) gives a divergence and a top-1 without rounding anything. Over the networks of
``benchmarks/prediction.csv`` its divergence D and that of real rounding are related by ``log D_real = shift + slope *
log D`` with a scatter of ``spread``; these three constants were fitted there, and are all that is fitted. What the
imitation loses in top-1 and in the loss is scaled by ``D_real / D``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from planish.flatness.imitation import Imitation, imitate
from planish.flatness.subject import Batch, Subject

NORMAL_90 = 1.645  # standard deviations on either side that hold 90 % of a Gaussian
SMALLEST = 1e-6  # nats; below it float32 rounds more than the quantizer


@dataclass(frozen=True)
class Calibration:
    """The relation between imitated and real divergence, in logarithms (see the module), and where it comes from."""

    shift: float
    slope: float
    spread: float
    source: str


# benchmarks/prediction.py --fit
FITTED = Calibration(shift=-0.225, slope=0.992, spread=0.356, source="16 convolutional networks and 12 transformers")


@dataclass(frozen=True)
class Prediction:
    """What calibrated rounding by ``scheme`` is expected to leave: loss in nats, top-1 with its 90 % interval."""

    scheme: str
    loss: float
    top1: float
    low: float
    high: float
    divergence: float


def predict(
    subject: Subject,
    scheme: str,
    fp_top1: float,
    *,
    draws: int = 2,
    seed: int = 0,
    batches: list[Batch] | None = None,
    reference: Tensor | None = None,
    calibration: Calibration = FITTED,
) -> Prediction:
    """Predict loss and top-1 under calibrated rounding without rounding.

    Args:
        fp_top1: of the network in float on the images that the prediction is for. The subject's own images give the
            share of it that is kept.
        draws: of noise.
        reference: the float network's logits on ``batches``, where the caller has them.

    Returns:
        The prediction; its loss is that on the subject's images, the interval holds 90 % where the network resembles
        those that the constants come from.
    """
    batches = batches or subject.batches
    labels = torch.cat([y for _, y in batches]).cpu()
    reference = subject.logits(batches) if reference is None else reference
    clean_loss = F.cross_entropy(reference, labels).item()
    clean_top1 = (reference.argmax(-1) == labels).double().mean().item()
    imitated = imitate(subject, scheme, draws=draws, seed=seed, batches=batches, reference=reference)
    return from_imitation(imitated, clean_loss, clean_top1, len(labels), fp_top1, calibration)


def from_imitation(
    imitated: Imitation, clean_loss: float, clean_top1: float, images: int, fp_top1: float, calibration: Calibration
) -> Prediction:
    """The arithmetic of :func:`predict`: a network that keeps the share ``exp(-x)`` keeps ``exp(-x * D_real / D)``."""
    before = max(imitated.divergence, SMALLEST)
    after = math.exp(calibration.shift + calibration.slope * math.log(before))
    worse, better = (after * math.exp(sign * NORMAL_90 * calibration.spread) for sign in (1, -1))
    # one image more is added to either side, so that no network keeps or loses everything by chance
    kept = (imitated.top1 * images + 1) / (clean_top1 * images + 1) if clean_top1 else 1.0
    exponent = -math.log(min(kept, 1.0))
    sampling = NORMAL_90 * math.sqrt(max(exponent, 1 / images) / images)  # of the images that change sides

    def top1(divergence: float) -> float:
        return fp_top1 * math.exp(-exponent * divergence / before)

    loss = clean_loss + (imitated.loss - clean_loss) * after / before
    middle, low, high = top1(after), top1(worse) - sampling, min(top1(better) + sampling, 1.0)
    return Prediction(imitated.scheme, loss, middle, max(low, 0.0), high, after)
