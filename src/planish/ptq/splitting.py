"""Channels behind a GELU that tower above the others become several, each with a part of the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import first_image
from planish.network.mlps import find_mlps
from planish.network.rebuilding import rebuilder
from planish.ptq.exactness import require_float
from planish.ptq.passes import Calibration, watch_sites
from planish.ptq.repq import input_formats

MOST = 64  # parts of one channel


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
        wider.weight.copy_(layer.weight[:, parts.index])
        if layer.bias is not None:
            wider.bias.copy_(layer.bias)
        wider.requires_grad_(layer.weight.requires_grad).train(layer.training)
        model.set_submodule(path, nn.Sequential(model.get_submodule(path), parts))
        model.set_submodule(reader, wider)
    return [path for path, *_ in places]


class _Largest(nn.Module):
    """The largest magnitude of each channel of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        found = x.detach().abs().flatten(0, -2).amax(0).float()
        self.value = torch.maximum(found, torch.as_tensor(self.value).to(found))
        return x


@dataclass(frozen=True)
class SplitOutliers:
    """Split channels behind the GELU of an MLP whose largest value is far above that of the others.

    Transformers have hidden channels that are a hundred times as large as the rest for a few tokens, and that the
    network needs (Sun et al. 2024, arXiv 2402.17762, "massive activations"): one range either cuts them, which breaks
    the network at any number of bits, or leaves the others without levels. Outlier channel splitting (Zhao et al. 2019,
    arXiv 1901.09504, section 3.2) repeats such a channel k times, each copy with 1/k of the value, and its weights as
    often. The outputs in float stay what they were; the layer behind is wider by as many columns. Behind ``Rotate`` or
    in front of it, before ``Calibrate``.

    Attributes:
        threshold: a channel is split into parts that are at most so many times as large as the median channel.

    Raises:
        PlanishError: the threshold is below 1, or the network has taps already.
    """

    threshold: float = 3.0
    name = "split-outliers"

    def __post_init__(self) -> None:
        if not 1 <= self.threshold < math.inf:
            raise PlanishError(f"{self.name}: threshold is {self.threshold}: give 1 or more, times the median channel")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        model, plan = calibration.model, calibration.assignment
        mlps = {mlp.second: mlp for mlp in find_mlps(model, first_image(calibration.batches[0]))}
        sites = {path: site.name for path, (site, _) in input_formats(calibration).items() if path in mlps}
        wanted = set(sites.values())
        watchers: dict[str, Any] = watch_sites(
            model, plan.products, calibration.batches, lambda site: _Largest() if site.name in wanted else None
        )
        largest = {path: watchers[name].value for path, name in sites.items()}
        counts = {path: self.parts(values) for path, values in largest.items()}
        places = [(mlps[path].gelu, path, count) for path, count in counts.items() if count]
        if not put_parts(model, places):
            calibration.note(self.name, "no channel behind a GELU stands out")
            return
        added = sum(count - 1 for _, _, split in places for _, count in split)
        every = sum(len(one) for one in largest.values())
        calibration.note(self.name, f"{added} channels were added to {every} behind the GELUs of {len(places)} MLPs")
        calibration.plan_anew()

    def parts(self, largest: Tensor) -> list[tuple[int, int]]:
        """(channel, number of parts) of the channels that are split, from the largest value of each."""
        limit = self.threshold * float(largest.median())
        if limit == 0:
            return []
        copies = (largest / limit).ceil().clamp(1, MOST).long()
        return [(int(channel), int(copies[channel])) for channel in (copies > 1).nonzero().flatten()]
