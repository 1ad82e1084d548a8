"""What a network is worth: top-1, negative log-likelihood, calibration, and flips against a reference.

Networks of several labels and of features have other numbers (``metrics.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from planish.errors import PlanishError
from planish.metrics import worth_of_features, worth_of_labels
from planish.network.batches import call_model, logits_of, split_batch, to_device
from planish.network.faults import BadBatch, going_through, label_fault, sound
from planish.network.modes import evaluating
from planish.task import CLASSES, FEATURES, LABELS, Task, check_task, targets_of, task_of
from planish.training.engine import make_accelerator

BINS = 15  # of the expected calibration error


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | Tensor | None = None,
    task: str | None = None,
    bank: Iterable[Any] | None = None,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Measure a network on labelled images; several processes share the work and count each image once.

    Args:
        model: the network; its train/eval mode is restored. It is moved to the accelerator's device and stays there.
        loader: batches of (inputs, labels).
        reference: a model (moved, too), or its logits in the order of the loader, to count flips against.
        task: what the outputs mean (:mod:`planish.task`): ``classes``, ``labels`` or ``features``. Default: what the
            model says in ``planish_task``, else classes; one logit alone is a label.
        bank: batches of other labelled images whose features vote on those of the loader, for ``features``.
        progress: called after each batch with (batches done, batches).

    Returns:
        For classes ``top1`` (share right), ``nll`` (nats per image), ``ece`` (expected calibration error, 15 equal
        bins, Guo et al. 2017, arXiv 1706.04599), ``flip_rate`` (share of images whose top-1 differs from the
        reference's; only with one). For labels and features see :func:`planish.metrics.worth_of_labels` and
        ``worth_of_features``; a flip is there any label that changes. Always ``images`` and ``seconds``.

    Raises:
        PlanishError: the loader is empty or yields no labels, a batch holds NaN or what the model cannot take, or a
            label is outside the model's classes.
    """
    said = task_of(model) if task is None else check_task(task)
    unlabelled = said is FEATURES  # which can be compared with the reference's without labels
    logits, labels, seconds = predict(model, loader, accelerator=accelerator, progress=progress, unlabelled=unlabelled)
    meaning = task_of(model, logits) if task is None else said
    other: Tensor | None = reference if isinstance(reference, Tensor) else None
    if isinstance(reference, nn.Module):
        other, again, _ = predict(reference, loader, accelerator=accelerator, unlabelled=unlabelled)
        if not torch.equal(labels, again):
            raise PlanishError(
                "the loader gave its images in another order the second time, so flips cannot be counted: "
                "evaluate with shuffle=False"
            )
    if meaning is FEATURES:
        voters = None if bank is None else predict(model, bank, accelerator=accelerator)[:2]
        found = worth_of_features(logits, labels if labels.numel() else None, _checked(other, logits), voters)
    else:
        found = worth(logits, labels, other, meaning)
    return found | {"images": len(logits), "seconds": seconds}


def worth(
    logits: Tensor, labels: Tensor, reference: Tensor | None = None, task: Task | None = None
) -> dict[str, float]:
    """``top1``, ``nll``, ``ece`` and, with the logits of a ``reference``, ``flip_rate``; see :func:`evaluate`.

    Args:
        logits, reference: (images, classes).
        labels: (images,); for the task of labels (images, labels).
        task: classes or labels; default: labels for one logit, else classes.
    """
    classes, other = logits.shape[-1], _checked(reference, logits)
    task = task or task_of(None, logits)
    if task is LABELS:
        result = worth_of_labels(logits, labels)
    else:
        result = _worth_of_classes(logits, labels, classes)
    if other is not None:
        result["flip_rate"] = (1 - task.alike(other, logits)).mean().item()
    return result


def _checked(reference: Tensor | None, logits: Tensor) -> Tensor | None:
    """The outputs of the reference, of as many images."""
    if reference is not None and len(reference) != len(logits):
        raise PlanishError(f"the reference has logits of {len(reference)} images, the loader has {len(logits)} images")
    return None if reference is None else reference.float().cpu()


def _worth_of_classes(logits: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    if classes == 1:
        raise PlanishError("a single logit is a label, to which a softmax says nothing: evaluate it with task='labels'")
    labels = targets_of(CLASSES, logits, labels)
    if labels.dim() == 2:  # probabilities
        labels = labels.argmax(-1)
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise PlanishError(
            f"a label is {int(labels.max() if labels.max() >= classes else labels.min())}, but the model has "
            f"{classes} classes (0 to {classes - 1}): check that model and data belong together"
        )
    top1 = MulticlassAccuracy(num_classes=classes, average="micro")(logits, labels)
    nll = MeanMetric()(F.cross_entropy(logits, labels, reduction="none"))
    ece = MulticlassCalibrationError(num_classes=classes, n_bins=BINS)(logits.softmax(-1), labels)
    return {"top1": top1.item(), "nll": nll.item(), "ece": ece.item()}


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
    unlabelled: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Logits (N, classes), labels (N,) and the seconds that it took, on the CPU, in the order of the loader.

    The model is moved to the accelerator's device and stays there. ``unlabelled``: a loader may yield images only; the
    labels are (N, 0) then.
    """
    accelerator = accelerator or make_accelerator(None)
    shared = isinstance(loader, torch.utils.data.DataLoader)  # among the processes; another iterable is read by each
    prepared: Any = accelerator.prepare_data_loader(loader) if shared else loader  # type: ignore[arg-type]
    model.to(accelerator.device)
    total = len(prepared) if hasattr(prepared, "__len__") else 0
    began = time.perf_counter()
    all_logits, all_labels = [], []
    with evaluating(model):
        for i, batch in enumerate(sound(prepared, "evaluation")):
            inputs, labels = split_batch(to_device(batch, accelerator.device))
            if labels is None and not unlabelled:
                raise PlanishError("evaluation needs labels, but the loader yields images only")
            logits = _logits(model, inputs, labels, i + 1)
            labels = torch.empty(len(logits), 0, device=logits.device) if labels is None else labels
            if shared:
                logits, labels = accelerator.gather_for_metrics((logits, labels))
            all_logits.append(logits.cpu())
            all_labels.append(labels.cpu())
            if progress:
                progress(i + 1, total)
    if not all_logits:
        raise PlanishError("the loader to evaluate on yields no batch: give it at least one image")
    return torch.cat(all_logits), torch.cat(all_labels), time.perf_counter() - began


def _logits(model: nn.Module, inputs: Any, labels: Tensor | None, number: int) -> Tensor:
    """The logits of one batch, whose labels belong to them; raises an error that names the batch."""
    try:
        with going_through(inputs):
            logits = logits_of(call_model(model, inputs)).float()
        if labels is not None and (fault := label_fault(labels, logits)) is not None:
            raise BadBatch(fault)
    except BadBatch as error:
        raise PlanishError(f"batch {number} of the evaluation loader {error}") from error
    return logits
