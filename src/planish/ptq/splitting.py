"""Channels behind a GELU that tower above the others become several, each with a part of the value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.hidden import Smoothed, put_parts
from planish.ptq.exactness import exact_ones, require_float
from planish.ptq.passes import Calibration
from planish.ptq.smoothing import largest_hidden

MOST = 64  # parts of one channel


@dataclass(frozen=True)
class SplitOutliers:
    """Split channels behind the GELU of an MLP whose largest value is far above that of the others.

    Transformers have hidden channels that are a hundred times as large as the rest for a few tokens, and that the
    network needs (Sun et al. 2024, arXiv 2402.17762, "massive activations"): one range either cuts them, which breaks
    the network at any number of bits, or leaves the others without levels. Outlier channel splitting (Zhao et al. 2019,
    arXiv 1901.09504, section 3.2) repeats such a channel k times, each copy with 1/k of the value, and its weights as
    often. The outputs in float stay what they were: where a few images show that they would not, because something else
    reads the hidden values, the log says so and the MLP is left as it is. The layer behind is wider by as many columns.
    Behind ``Rotate`` or in front of it, before ``Calibrate``.

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
        model = calibration.model
        largest = largest_hidden(calibration, (Smoothed,))
        found = {mlp.gelu: (mlp.second, counts) for mlp, values in largest.items() if (counts := self.parts(values))}
        if not found:
            calibration.note(self.name, "no channel behind a GELU stands out")
            return
        exact, left_out = exact_ones(model, found, _split, calibration.batches[0], "splitting channels of")
        for text in left_out:
            calibration.note(self.name, text)
        if exact:
            _split(model, exact)
            calibration.plan_anew()
            added = sum(count - 1 for _, counts in exact.values() for _, count in counts)
            every = sum(len(one) for one in largest.values())
            calibration.note(self.name, f"{added} channels were added to {every} behind the GELUs of {len(exact)} MLPs")

    def parts(self, largest: Tensor) -> list[tuple[int, int]]:
        """(channel, number of parts) of the channels that are split, from the largest value of each."""
        limit = self.threshold * float(largest.median())
        if limit == 0:
            return []
        copies = (largest / limit).ceil().clamp(1, MOST).long()
        return [(int(channel), int(copies[channel])) for channel in (copies > 1).nonzero().flatten()]


def _split(model: nn.Module, found: Mapping[str, tuple[str, list[tuple[int, int]]]]) -> None:
    """Put the parts behind GELUs; by path of the GELU, with that of the layer behind and how often which channel."""
    put_parts(model, [(gelu, second, counts) for gelu, (second, counts) in found.items()])
