"""What goes into a model and what comes out, for the shapes that PyTorch, timm and Hugging Face use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError

_LABELS = ("labels", "label", "target", "targets")


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, where a tuple is spread over the arguments and a mapping over the keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch as (inputs, labels): ``(images, labels)``, a mapping with a key such as ``labels``, or bare images."""
    if isinstance(batch, Mapping):
        key = next((k for k in _LABELS if k in batch), None)
        return {k: v for k, v in batch.items() if k != key}, None if key is None else batch[key]
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise PlanishError(
            f"a batch of the loader has {len(batch)} parts; planish takes (images, labels), "
            f"a mapping with 'labels', or images"
        )
    return batch, None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, an object or mapping with ``logits``, or the first part of a tuple.

    Of a model without a head, whose output has no logits, the features: ``pooler_output``, else ``last_hidden_state``.
    """
    if isinstance(output, Tensor):
        return output
    logits = None
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if logits is None:
            logits = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if logits is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise PlanishError(
            f"the model returns a {type(output).__name__} without logits; return a tensor, a tuple that starts with "
            f"one, or an object with an attribute called logits"
        )
    return logits


def to_device(inputs: Any, device: Any) -> Any:
    """Every tensor in the inputs, moved."""
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def first_image(inputs: Any) -> Any:
    """The inputs with a batch of one."""
    return cut(inputs, 0, 1)


def cut(inputs: Any, start: int, stop: int) -> Any:
    """The images from ``start`` to ``stop`` of a batch of inputs (or of inputs and labels)."""
    return map_tensors(inputs, lambda tensor: tensor[start:stop])


def copied(inputs: Any) -> Any:
    """The inputs with a copy of each tensor; what is one tensor stays one, as attention's query and key may be."""
    copies: dict[int, Tensor] = {}
    return map_tensors(inputs, lambda tensor: copies.setdefault(id(tensor), tensor.clone()))


def join(batches: Sequence[Any]) -> Any:
    """One batch of inputs out of several, for whatever nesting of tensors they are."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {key: join([batch[key] for batch in batches]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(join(parts) for parts in zip(*batches, strict=True))
    return first


def first_images(batches: Sequence[Any], count: int) -> Any:
    """One batch with the first so many images of some batches of inputs, or all if there are fewer."""
    sizes = list(itertools.accumulate(size_of(batch) for batch in batches))
    needed = 1 + sum(size < count for size in sizes)
    return cut(join(batches[:needed]), 0, count)


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors in the inputs."""
    found: list[Tensor] = []
    map_tensors(inputs, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def size_of(inputs: Any) -> int:
    """How many images a batch of inputs (or of inputs and labels) has."""
    sizes = [len(tensor) for tensor in tensors_of(inputs)]
    if not sizes:
        raise PlanishError(f"a batch of the loader is a {type(inputs).__name__} without a tensor: it needs images")
    return sizes[0]


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(map_tensors(value, function) for value in inputs)
    return inputs
