"""What outputs are worth that are no classes: several labels an image, or features."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import (
    BinaryAveragePrecision,
    BinaryF1Score,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from planish.errors import PlanishError
from planish.task import FEATURES, LABELS, targets_of

NEIGHBOURS, SHARPNESS = 20, 0.07  # of the vote of neighbours (Wu et al. 2018, arXiv 1805.01978)
CHUNK = 1024  # images whose distances to all others are held at once


def worth_of_labels(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How well yes and no are told apart for each label, by a sigmoid.

    Args:
        logits: (images, labels). labels: (images, labels) of 0 and 1, or (images,) numbers of the one label.

    Returns:
        ``map`` (mean average precision over the labels that occur), ``ap_micro`` (over all decisions together), ``f1``
        (mean over the labels) and ``f1_micro`` at a probability of 0.5, ``exact`` (share of images with every label
        right) and ``nll`` (nats for a label).
    """
    targets = targets_of(LABELS, logits, labels)
    nll = F.binary_cross_entropy_with_logits(logits, targets).item()
    truth, count = (targets >= 0.5).long(), logits.shape[-1]
    exact = ((logits > 0).long() == truth).all(-1).float().mean().item()
    probabilities = logits.sigmoid()
    pooled = probabilities.flatten(), truth.flatten()
    found = {"ap_micro": BinaryAveragePrecision()(*pooled), "f1_micro": BinaryF1Score()(*pooled)}
    if count == 1:
        macro = {"map": found["ap_micro"], "f1": found["f1_micro"]}
    else:
        occurs = truth.any(0)
        kept = probabilities[:, occurs], truth[:, occurs]
        with warnings.catch_warnings():  # about labels that every image has
            warnings.simplefilter("ignore")
            macro = {"f1": MultilabelF1Score(num_labels=count, average="macro")(probabilities, truth)}
            seen = int(occurs.sum())
            if seen > 1:
                macro["map"] = MultilabelAveragePrecision(num_labels=seen)(*kept)
            else:
                macro["map"] = BinaryAveragePrecision()(*(part.flatten() for part in kept))
    return {key: float(value) for key, value in (macro | found).items()} | {"exact": exact, "nll": nll}


def worth_of_features(
    features: Tensor, labels: Tensor | None, reference: Tensor | None, bank: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """How near features are to the float network's, and what the labels of the nearest images tell.

    Args:
        features, reference: (images, ...), flattened.
        labels: (images,) class numbers, if there are any.
        bank: features and labels of other images, which vote; without it the images vote on each other, none on itself.

    Returns:
        ``cosine`` and ``error`` (mean cosine similarity to the reference, and half the mean relative squared distance),
        with a reference; ``knn_top1`` (share of images whose 20 nearest neighbours by cosine, weighted by
        ``exp(cosine / 0.07)``, vote for their class), with labels.
    """
    found: dict[str, float] = {}
    if reference is not None:
        found["cosine"] = FEATURES.alike(reference, features).mean().item()
        found["error"] = FEATURES.distance(reference, features).mean().item()
    if labels is not None and (bank is not None or len(labels) > 1):
        found["knn_top1"] = knn_top1(features, labels, *(bank or (features, labels)), itself=bank is None)
    return found


def knn_top1(features: Tensor, labels: Tensor, others: Tensor, theirs: Tensor, *, itself: bool = False) -> float:
    """Share of images whose nearest others vote for their class; see :func:`worth_of_features`.

    Args:
        itself: the others are the images themselves, and none votes on itself.
    """
    if labels.dim() != 1 or theirs.dim() != 1 or labels.is_floating_point():
        raise PlanishError("the neighbours of features vote with one class an image: give labels as whole numbers (N,)")
    mine, all_others = (F.normalize(x.flatten(1).float(), dim=-1) for x in (features, others))
    classes = int(torch.maximum(labels.max(), theirs.max())) + 1
    nearest = min(NEIGHBOURS, len(all_others) - itself)
    right = 0
    for start in range(0, len(mine), CHUNK):
        cosines = mine[start : start + CHUNK] @ all_others.T
        if itself:
            rows = torch.arange(len(cosines))
            cosines[rows, rows + start] = -torch.inf
        closeness, which = cosines.topk(nearest, -1)
        votes = torch.zeros(len(cosines), classes).scatter_add_(1, theirs[which], (closeness / SHARPNESS).exp())
        right += int((votes.argmax(-1) == labels[start : start + CHUNK]).sum())
    return right / len(mine)
