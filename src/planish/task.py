"""What the outputs of a network mean; everything that compares outputs, with labels or with each other, asks here.

``classes``: one of C, by a softmax. ``labels``: each of C is true or not, by a sigmoid; a single logit is always that.
``features``: a direction in space, read by something else; there is nothing right or wrong about it but its distance
from the float network's. A network says by its attribute ``planish_task`` what its outputs are, copies keep it, and
without it they are classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError

ATTRIBUTE = "planish_task"


@dataclass(frozen=True)
class Task:
    """One meaning of outputs of shape (N, C).

    Attributes:
        name: ``classes``, ``labels`` or ``features``.
        distance: ``(reference, outputs)`` -> (N,): how far each row is from the reference's. Nats for classes and
            labels, half the relative squared distance for features. Zero where both are equal.
        alike: ``(reference, outputs)`` -> (N,) in [0, 1]: 1 where both say the same; for features their cosine.
        draw: ``(outputs, generator)`` -> the sum of -log p(y) over the rows, for targets y drawn from the outputs
            themselves; the square of its gradient is a sample of the Fisher information's diagonal.
        same: what two outputs have in common where ``alike`` is 1, in words.
    """

    name: str
    distance: Callable[[Tensor, Tensor], Tensor]
    alike: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor, torch.Generator], Tensor]
    same: str

    def exact(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """The distance of each row, (N,), in float64 and nowhere below 0."""
        return self.distance(reference.double(), outputs.double()).clamp(min=0)

    def divergence(self, reference: Tensor, outputs: Tensor, temperature: float = 1.0) -> Tensor:
        """The mean distance over the rows, of both divided by the temperature (features have none)."""
        if self is FEATURES:
            return self.distance(reference.float(), outputs.float()).mean()
        reference, outputs = reference.float() / temperature, outputs.float() / temperature
        if self is CLASSES:  # in one kernel
            ours, theirs = (F.log_softmax(t, -1).flatten(0, -2) for t in (outputs, reference))
            return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return self.distance(reference, outputs).mean()


def _kl(reference: Tensor, outputs: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(outputs))``."""
    p, q = reference.log_softmax(-1), outputs.log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def _bernoulli_kl(reference: Tensor, outputs: Tensor) -> Tensor:
    """The sum of ``KL(sigmoid(reference) || sigmoid(outputs))`` over the labels, which are independent."""
    p = reference.sigmoid()
    yes = F.logsigmoid(reference) - F.logsigmoid(outputs)
    no = F.logsigmoid(-reference) - F.logsigmoid(-outputs)
    return (p * yes + (1 - p) * no).sum(-1)


def _relative(reference: Tensor, outputs: Tensor) -> Tensor:
    """``|outputs - reference|^2 / (2 |reference|^2)``: 1 - cosine, where both are equally long."""
    outputs, reference = outputs.flatten(1), reference.flatten(1)
    return (outputs - reference).square().sum(-1) / (2 * reference.square().sum(-1)).clamp(min=1e-30)


def _cosine(reference: Tensor, outputs: Tensor) -> Tensor:
    return F.cosine_similarity(reference.flatten(1), outputs.flatten(1), dim=-1).clamp(0, 1)


def _draw_class(outputs: Tensor, generator: torch.Generator) -> Tensor:
    log_p = outputs.log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    return -log_p.gather(-1, drawn).sum()


def _draw_labels(outputs: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.bernoulli(outputs.detach().sigmoid().cpu(), generator=generator).to(outputs)
    return F.binary_cross_entropy_with_logits(outputs, drawn, reduction="sum")


def _draw_features(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Under noise as large as the features are long, whose divergence is ``_relative``: the gradient is the noise."""
    outputs = outputs.flatten(1)
    noise = torch.randn(outputs.shape, generator=generator).to(outputs)
    return (outputs * noise / outputs.detach().norm(dim=-1, keepdim=True).clamp(min=1e-15)).sum()


CLASSES = Task("classes", _kl, lambda a, b: (a.argmax(-1) == b.argmax(-1)).float(), _draw_class, "first class")
LABELS = Task("labels", _bernoulli_kl, lambda a, b: ((a > 0) == (b > 0)).all(-1).float(), _draw_labels, "labels")
FEATURES = Task("features", _relative, _cosine, _draw_features, "direction")
TASKS = {task.name: task for task in (CLASSES, LABELS, FEATURES)}


def check_task(name: str) -> Task:
    """The task of a name; raises :class:`PlanishError` with the names that exist."""
    if name not in TASKS:
        raise PlanishError(f"the task is {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def say_task(model: nn.Module, name: str | None) -> None:
    """Note on a network what its outputs mean; ``None`` leaves what it says already."""
    if name is not None:
        setattr(model, ATTRIBUTE, check_task(name).name)


def task_of(model: Any, outputs: Tensor | None = None) -> Task:
    """What the outputs of a network mean. One logit alone is a label: a softmax over it says nothing."""
    task = check_task(getattr(model, ATTRIBUTE, None) or CLASSES.name)
    return LABELS if task is CLASSES and outputs is not None and outputs.shape[-1] == 1 else task


def targets_of(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    """The labels of a batch as the loss takes them.

    Args:
        outputs: (N, C).
        labels: (N,) whole numbers, or (N, C): 0 and 1, or shares between them, for ``labels``, and probabilities that
            sum to 1 for ``classes``.

    Returns:
        (N,) whole numbers or (N, C) probabilities for ``classes``, (N, C) in the type of the outputs for ``labels``.

    Raises:
        PlanishError: the shapes do not fit, or it has to be said which task this is.
    """
    classes, shape = outputs.shape[-1], tuple(labels.shape)
    if labels.dim() == 2 and shape != tuple(outputs.shape):
        raise PlanishError(f"the labels of a batch have shape {shape}, the outputs {tuple(outputs.shape)}: one each")
    if task is not LABELS:
        if labels.dim() == 2 and not torch.allclose(labels.sum(-1).float(), torch.ones(len(labels)).to(labels.device)):
            raise PlanishError(
                f"the labels of a batch have shape {shape} and their rows do not sum to 1: if an image may have "
                f"several labels, say task='labels'"
            )
        return labels
    if labels.dim() == 1:
        highest = int(labels.max()) if len(labels) else 0
        if highest >= max(2, classes) or (len(labels) and int(labels.min()) < 0):
            raise PlanishError(f"a label is {highest}, but the model has {classes} outputs: give numbers below it")
        hot = labels[:, None] if classes == 1 else F.one_hot(labels.long(), classes)
        return hot.to(outputs)
    if len(labels) and (float(labels.min()) < 0 or float(labels.max()) > 1):
        raise PlanishError(
            "labels, several of an image, are 0 or 1 (or between), and some lie outside: look at the loader"
        )
    return labels.to(outputs)


def task_loss(task: Task, outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the classes, or the mean binary cross-entropy over all labels (as ``BCEWithLogitsLoss``).

    Smoothing draws classes towards 1 / C and labels towards 1 / 2.
    """
    targets = targets_of(task, outputs, labels)
    if task is LABELS:
        return F.binary_cross_entropy_with_logits(outputs, targets * (1 - label_smoothing) + label_smoothing / 2)
    return F.cross_entropy(outputs, targets, label_smoothing=label_smoothing)
