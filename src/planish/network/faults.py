"""What is wrong with a batch, found before it spoils weights, ranges or numbers: its values, its shape, its labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError, is_lost_connection, is_out_of_memory, waits_for_gradient
from planish.network.batches import map_tensors, split_batch


class BadBatch(PlanishError):
    """A batch that a loader should not have given; the message is what it holds, its number comes before it."""


def fault_in(inputs: Any) -> str | None:
    """What is wrong with the inputs of a batch: NaN or infinite values, or no image at all; ``None`` if nothing is.

    Costs one sum over the inputs, and on an accelerator one wait for it. A quantizer clips what is infinite, so that
    nothing after it would show it.
    """
    found: list[str] = []

    def look(tensor: Tensor) -> Tensor:
        if not found and (fault := _fault(tensor)) is not None:
            found.append(fault)
        return tensor

    map_tensors(inputs, look)
    return found[0] if found else None


def _fault(tensor: Tensor) -> str | None:
    if tensor.dim() and not len(tensor):
        return "holds no image"
    if not tensor.is_floating_point():
        return None
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    if math.isfinite(tensor.detach().sum(dtype=torch.float32 if half else None).item()):
        return None
    bad = ~torch.isfinite(tensor.detach())
    images = bad.reshape(len(bad), -1).any(1) if bad.dim() else bad[None]
    count = int(images.sum())
    if not count:  # the sum alone was too large
        return None
    kind = "NaN" if bool(tensor.isnan().any()) else "infinite values"
    return f"holds {kind} in {count} of {len(images)} images (the first is number {int(images.int().argmax()) + 1})"


def label_fault(labels: Any, logits: Tensor) -> str | None:
    """Whether the labels of a batch are one integer an image, or have the shape of the logits; read without waiting."""
    if not isinstance(labels, Tensor):
        return f"has labels that are a {type(labels).__name__}: expected a tensor of class numbers"
    if labels.shape == logits.shape:
        return None
    if labels.shape != logits.shape[:1]:
        return (
            f"has labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}: expected one class "
            f"number an image, {tuple(logits.shape[:1])}"
        )
    number = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not number and logits.shape[-1] != 1:  # one logit alone is a label, which may be true or a share
        return f"has labels of type {_name(labels.dtype)}: expected class numbers, which are integers"
    return None


def range_fault(labels: Any, classes: int) -> str | None:
    """Whether class numbers lie outside 0 to ``classes - 1``; on an accelerator it waits for them."""
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or not len(labels):
        return None
    least, most = (int(value) for value in labels.aminmax())
    if least >= 0 and most < classes:
        return None
    return (
        f"has the label {most if most >= classes else least}, but the model has {classes} classes (0 to {classes - 1})"
    )


def sound(batches: Iterable[Any], what: str) -> Iterator[Any]:
    """The batches of a loader as they come, as long as their inputs are sound.

    Args:
        what: the loader in messages, such as "calibration".

    Raises:
        BadBatch: with the number of the batch.
    """
    for number, batch in enumerate(batches, 1):
        if (fault := fault_in(split_batch(batch)[0])) is not None:
            raise BadBatch(f"batch {number} of the {what} loader {fault}: make the loader leave such images out")
        yield batch


@contextmanager
def going_through(inputs: Any) -> Iterator[None]:
    """Say of which shape the inputs were that a model could not take."""
    try:
        yield
    except PlanishError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if is_out_of_memory(error) or is_lost_connection(error) or waits_for_gradient(error):
            raise  # the images have no part in it
        shapes: list[str] = []
        map_tensors(inputs, lambda tensor: _described(tensor, shapes))
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise BadBatch(f"holds {' and '.join(shapes) or 'no tensor'}, which the model cannot take: {reason}") from error


def _described(tensor: Tensor, shapes: list[str]) -> Tensor:
    shapes.append(f"{_name(tensor.dtype)} of shape {tuple(tensor.shape)}")
    return tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
