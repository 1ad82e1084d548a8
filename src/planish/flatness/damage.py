"""What low bits do to a classifier beyond its top-1: flips, classes, calibration, and corrupted images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassCalibrationError

from planish.errors import PlanishError
from planish.evaluation import BINS
from planish.flatness.corruptions import STANDARD, corrupt, corrupted
from planish.flatness.subject import Subject
from planish.network.batches import call_model, logits_of, map_tensors, split_batch, to_device
from planish.network.faults import sound
from planish.network.modes import evaluating
from planish.preprocessing import Preprocessing

Classifier = Callable[[Any], Any]  # inputs to logits, or to an output that holds them
Share = float  # the fields below are called float, which hides the type


@dataclass(frozen=True)
class ClassDamage:
    """One class: its images, and the share of them that the float and the low-bit network get right."""

    name: str
    images: int
    float: Share
    low_bit: Share


@dataclass(frozen=True)
class Damage:
    """How a low-bit network differs from the float one on the same images.

    Attributes:
        images: how many.
        flips: share of images whose top-1 differs from the float network's.
        right_to_wrong, wrong_to_right: numbers of images; other flips go from one wrong class to another.
        ece_float, ece_low_bit: expected calibration error, 15 equal bins (Guo et al. 2017, arXiv 1706.04599).
        classes: those that have images, in the order of their labels.
    """

    images: int
    flips: Share
    right_to_wrong: int
    wrong_to_right: int
    ece_float: Share
    ece_low_bit: Share
    classes: list[ClassDamage]


@dataclass(frozen=True)
class CorruptionDamage:
    """Share of corrupted images that the float and the low-bit network get right."""

    kind: str
    strength: int
    float: Share
    low_bit: Share


def damage(
    reference_logits: Tensor, logits: Tensor, labels: Tensor, class_names: Sequence[str] | None = None
) -> Damage:
    """Compare a low-bit network with the float one.

    Args:
        reference_logits: of the float network, (N, classes).
        logits: of the low-bit network on the same images, (N, classes).
        labels: (N,).
        class_names: one a class; default: the numbers of the classes.

    Raises:
        PlanishError: the shapes do not belong together, there is no image, or a label is outside the classes.
    """
    _check(reference_logits, logits, labels, class_names)
    names = [str(i) for i in range(logits.shape[-1])] if class_names is None else list(class_names)
    before, after = reference_logits.argmax(-1), logits.argmax(-1)
    right, kept = before == labels, after == labels

    def of_class(label: int) -> ClassDamage:
        mine = labels == label
        return ClassDamage(names[label], int(mine.sum()), _share(right[mine]), _share(kept[mine]))

    return Damage(
        images=len(labels),
        flips=_share(before != after),
        right_to_wrong=int((right & ~kept).sum()),
        wrong_to_right=int((~right & kept).sum()),
        ece_float=calibration_error(reference_logits, labels),
        ece_low_bit=calibration_error(logits, labels),
        classes=[of_class(label) for label in labels.unique().tolist()],
    )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of logits (N, classes), as :func:`planish.evaluate` measures it."""
    metric = MulticlassCalibrationError(num_classes=logits.shape[-1], n_bins=BINS)
    return metric(logits.float().softmax(-1), labels).item()


def corruption_damage(
    float_model: Classifier,
    low_bit_model: Classifier,
    loader: Iterable[Any],
    preprocessing: Preprocessing,
    kinds: Sequence[str] = STANDARD,
    strengths: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[CorruptionDamage]:
    """Top-1 of two classifiers on corrupted images, each image corrupted the same way for both.

    Args:
        float_model, low_bit_model: functions of inputs. Modules run in evaluation mode on the device they are on; for
            the two sides of a :class:`~planish.flatness.subject.Subject` see :func:`switched`.
        loader: batches of (inputs, labels), normalized as ``preprocessing`` says; read once. Of several input tensors
            those of four dimensions are images.
        kinds: of :data:`planish.flatness.corruptions.KINDS`.
        strengths: 1 to 5; 0 are clean images.
        seed: with the place of an image in the loader it decides what the corruption does to it.
        progress: called after each batch with (batches done, batches, or 0 if the loader does not say).

    Raises:
        PlanishError: an unknown kind or strength, no labels, or an empty loader.
    """
    trials = [(kind, strength) for kind in kinds for strength in strengths]
    for kind, strength in trials:
        corrupt(torch.empty(0, 1, 1, 1), kind, strength)  # complain before the work begins
    right, images = torch.zeros(len(trials), 2, dtype=torch.long), 0
    total = len(loader) if isinstance(loader, Sized) else 0
    with ExitStack() as stack, torch.no_grad():
        models = [_prepared(model, stack) for model in (float_model, low_bit_model)]
        for done, batch in enumerate(sound(loader, "test"), start=1):
            inputs, labels = split_batch(batch)
            if labels is None:
                raise PlanishError("damage under corruption needs labels, but the loader yields images only")
            labels = labels.cpu()
            for i, trial in enumerate(trials):
                changed = map_tensors(inputs, partial(_corrupted, preprocessing, trial, seed, images))
                for j, model in enumerate(models):
                    right[i, j] += (logits_of(model(changed)).argmax(-1).cpu() == labels).sum()
            images += len(labels)
            if progress:
                progress(done, total)
    if not images:
        raise PlanishError("the loader to corrupt yields no batch: give it at least one image")
    shares = (right.double() / images).tolist()
    return [CorruptionDamage(*trial, *share) for trial, share in zip(trials, shares, strict=True)]


def switched(subject: Subject, scheme: str | None = None) -> Classifier:
    """The subject's network as a function of inputs: in float, or rounded to a scheme that it was prepared with."""
    taps = {} if scheme is None else subject.grids(scheme)

    def classify(inputs: Any) -> Tensor:
        with subject.tapped(taps):
            return logits_of(call_model(subject.model, to_device(inputs, _device(subject.model))))

    return classify


def _prepared(model: Classifier, stack: ExitStack) -> Classifier:
    if not isinstance(model, nn.Module):
        return model
    stack.enter_context(evaluating(model))
    device = _device(model)
    return lambda inputs: call_model(model, to_device(inputs, device))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _corrupted(preprocessing: Preprocessing, trial: tuple[str, int], seed: int, start: int, x: Tensor) -> Tensor:
    return corrupted(x, preprocessing, *trial, seed, start) if x.dim() == 4 else x


def _share(true: Tensor) -> float:
    return true.double().mean().item()


def _check(reference: Tensor, logits: Tensor, labels: Tensor, names: Sequence[str] | None) -> None:
    fit = logits.dim() == 2 and reference.shape == logits.shape and labels.shape == logits.shape[:1]
    if not fit or not len(labels) or logits.shape[1] < 2:
        raise PlanishError(
            f"damage needs logits (images, 2 classes or more) of both networks and one label an image, got shapes "
            f"{tuple(reference.shape)}, {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    classes = logits.shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise PlanishError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but there are {classes} classes"
        )
    if names is not None and len(names) != classes:
        raise PlanishError(f"{len(names)} names do not fit {classes} classes: give one a class")
