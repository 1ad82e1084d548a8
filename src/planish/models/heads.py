"""The last layer of a network, whose size is the number of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def head_size(own: Mapping[str, Tensor], state: Mapping[str, Tensor], classes: int) -> int | None:
    """How many classes a checkpoint has, by what differs from a network that has ``classes`` of them.

    Args:
        own: the network's tensors, of which only the shapes are read.
        state: those of the checkpoint.

    Returns:
        The number, or None where the shapes differ in another way, or nowhere.
    """
    found = set()
    for key, tensor in own.items():
        other = state.get(key)
        if other is None or other.shape == tensor.shape:
            continue
        if not tensor.dim() or other.dim() != tensor.dim() or len(tensor) != classes:
            return None
        if other.shape[1:] != tensor.shape[1:]:
            return None
        found.add(len(other))
    return found.pop() if len(found) == 1 else None


@contextmanager
def new_head() -> Iterator[None]:
    """What is drawn inside is the same every time; the random numbers of the caller stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
