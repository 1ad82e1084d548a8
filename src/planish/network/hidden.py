"""What may stand between the GELU of an MLP and the layer behind it: factors of channels, and channels in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from planish.network.rebuilding import exchange, rebuilder


class Smoothed(nn.Module):
    """A module whose channels (last dimension) are multiplied by a factor each."""

    factors: Tensor

    def __init__(self, inner: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("factors", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out * self.factors.to(out.dtype)


@rebuilder("smooth-hidden")
def put_factors(model: nn.Module, places: Sequence[tuple[str, int]]) -> list[str]:
    """Put factors behind modules, in place; all are 1. Returns the paths.

    Args:
        places: the path of a module and the number of its channels.
    """
    for path, channels in places:
        inner = model.get_submodule(path)
        device = next((p.device for p in model.parameters()), None)
        exchange(model, path, Smoothed(inner, channels).to(device))
    return [path for path, _ in places]


class Parts(nn.Module):
    """Repeats some channels of the last dimension, each copy divided by the number of its copies.

    Args:
        channels: how many there are.
        counts: (channel, how many parts) of those that have more than one.
    """

    index: Tensor
    factors: Tensor

    def __init__(self, channels: int, counts: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        copies = dict(counts)
        index = [channel for channel in range(channels) for _ in range(copies.get(channel, 1))]
        self.register_buffer("index", torch.tensor(index))
        self.register_buffer("factors", torch.tensor([1 / copies.get(channel, 1) for channel in index]))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.factors.to(x.dtype)


@rebuilder("split-outliers")
@torch.no_grad()
def put_parts(model: nn.Module, places: Sequence[tuple[str, str, Sequence[tuple[int, int]]]]) -> list[str]:
    """Split channels between two modules, in place; returns the paths of the first.

    Args:
        places: the path of a module, that of the linear layer which reads its output, and (channel, number of parts).
    """
    for path, reader, counts in places:
        layer = model.get_submodule(reader)
        assert isinstance(layer, nn.Linear)
        parts = Parts(layer.in_features, counts).to(layer.weight.device)
        wider = nn.Linear(len(parts.index), layer.out_features, layer.bias is not None).to(layer.weight)
        copies = (parts.index[:, None] == parts.index).sum(1)
        # of the factors as they are stored: 1 / 3 is not a number of theirs
        wider.weight.copy_(layer.weight[:, parts.index].double() / (copies * parts.factors.double()))
        if layer.bias is not None:
            wider.bias.copy_(layer.bias)
        exchange(model, path, nn.Sequential(model.get_submodule(path), parts))
        exchange(model, reader, wider.requires_grad_(layer.weight.requires_grad))
    return [path for path, *_ in places]
