"""How much memory the graph of a gradient takes, and how images are cut so that it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from planish.network.batches import cut

Batch = tuple[Any, Any]  # inputs and labels
Gradients = Callable[[Any, Tensor], list[Tensor]]


FEW = 16  # images; smaller pieces pay for the weights' own part of a product more than they gain


def plan_graphs(
    batches: Sequence[Batch],
    gradients: Gradients,
    memory: int,
    held: Sequence[Tensor] = (),
    *,
    near: int | None = None,
) -> tuple[list[Batch], int]:
    """Cut batches so that the graph of each takes at most a quarter of ``memory`` (or has one image).

    Args:
        batches: inputs and labels, image by image in the first dimension of every tensor.
        gradients: computes the gradient of the loss on a batch, with its graph.
        memory: bytes.
        held: tensors that are there anyway, such as the weights; they do not count.
        near: bytes that fit where a processor reads fastest: no piece is larger, as long as it has 16 images.

    Returns:
        The pieces, and how many of them, from the first, can be kept while another graph is built.
    """
    batches = [batch for batch in batches if len(batch[1])]
    if not batches:
        return [], 0
    # what one image takes, and what is saved however many images there are
    inputs, labels = max(batches, key=lambda batch: len(batch[1]))
    one, two = (graph_bytes(gradients, *_part(inputs, labels, 0, count), held) for count in (1, 2))
    per_image = two - one if len(labels) > 1 else one
    fixed = max(0, one - per_image)
    longest = max(1, int((memory // 4 - fixed) / max(per_image, 1)))
    if near is not None:
        longest = min(longest, max(FEW, int((near - fixed) / max(per_image, 1))))
    pieces = [piece for inputs, labels in batches for piece in _pieces(inputs, labels, longest)]
    costs = [fixed + per_image * len(labels) for _, labels in pieces]
    if sum(costs) <= memory:
        return pieces, len(pieces)
    kept, taken = 0, max(costs)  # room for the graph that is built and thrown away
    while taken + costs[kept] <= memory:
        taken += costs[kept]
        kept += 1
    return pieces, kept


def graph_bytes(gradients: Gradients, inputs: Any, labels: Tensor, held: Sequence[Tensor] = ()) -> int:
    """Bytes of all different tensors, but those ``held``, that autograd saves for a gradient with its graph."""
    there = {tensor.untyped_storage().data_ptr() for tensor in held}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would be in a cycle with its own node

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = gradients(inputs, labels)  # held until all is counted: addresses must not be used twice
    size = sum(count for address, count in found.items() if address not in there)
    del graph
    return size


def _pieces(inputs: Any, labels: Tensor, longest: int) -> list[Batch]:
    """As few pieces as that allows, of nearly one length."""
    count = -(-len(labels) // longest)
    step = -(-len(labels) // count)
    return [_part(inputs, labels, start, start + step) for start in range(0, len(labels), step)]


def _part(inputs: Any, labels: Tensor, start: int, stop: int) -> Batch:
    return cut(inputs, start, stop), labels[start:stop]
