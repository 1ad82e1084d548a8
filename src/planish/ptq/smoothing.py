"""Hidden channels behind a GELU brought nearer to each other by factors that the weights behind take back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import first_image
from planish.network.hidden import put_factors
from planish.network.mlps import MLP, find_mlps
from planish.ptq.exactness import exact_ones, require_float
from planish.ptq.outputs import count_holders
from planish.ptq.passes import Calibration, watch_sites
from planish.ptq.repq import input_formats

LEAST = 0.01  # smallest largest value of a channel, relative to the median: one that is always zero has none


class Largest(nn.Module):
    """The largest magnitude of each channel of what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        found = x.detach().abs().flatten(0, -2).amax(0).float()
        self.value = torch.maximum(found, torch.as_tensor(self.value).to(found))
        return x


def largest_hidden(calibration: Calibration, also: tuple[type[nn.Module], ...] = ()) -> dict[MLP, Tensor]:
    """The largest magnitude of each hidden channel of the MLPs whose second layer has quantized inputs.

    Args:
        also: classes of modules that count as a GELU.
    """
    inputs = input_formats(calibration)
    mlps = find_mlps(calibration.model, first_image(calibration.batches[0]), also)
    sites = {inputs[mlp.second][0].name: mlp for mlp in mlps if mlp.second in inputs}
    products = calibration.assignment.products
    watchers: dict[str, Any] = watch_sites(
        calibration.model, products, calibration.batches, lambda site: Largest() if site.name in sites else None
    )
    return {mlp: watchers[name].value for name, mlp in sites.items()}


@dataclass(frozen=True)
class SmoothHidden:
    """Divide the hidden channels of an MLP by a power of their largest values, and multiply the weights behind.

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 4, here without the weights' part) moves the differences
    between channels from the activations into the weights. Behind a norm the norm takes the factors; behind a GELU
    nothing can, so they are a multiplication of each hidden value. The outputs in float stay what they were: where a
    few images show that they would not, because something else reads the hidden values, the log says so and the MLP is
    left as it is. Before ``SplitOutliers``, which then has less to split, and before ``Calibrate``. A layer that shares
    its weight with another is left as it is, too.

    Attributes:
        strength: the power. At 1 all channels would reach as far, and the weights would take all the differences.
        most: what counts of a channel that reaches farther than so many medians. Its weights would tower in the layer
            behind as its values do in this one; the rest is for ``SplitOutliers``.

    Raises:
        PlanishError: the strength is not above 0 and at most 1, ``most`` is below 1, or the network has taps already.
    """

    strength: float = 0.25
    most: float = 3.0
    name = "smooth-hidden"

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise PlanishError(f"{self.name}: strength is {self.strength}: give a power above 0, at most 1")
        if not 1 <= self.most < math.inf:
            raise PlanishError(f"{self.name}: most is {self.most}: give 1 or more, times the median channel")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        model, holders = calibration.model, count_holders(calibration.model)
        found = {
            mlp.gelu: (mlp.second, self.factors(largest))
            for mlp, largest in largest_hidden(calibration).items()
            if holders[id(model.get_submodule(mlp.second).weight)] == 1
        }
        if not found:
            calibration.note(self.name, "no GELU was found right in front of a linear layer with quantized inputs")
            return
        exact, left_out = exact_ones(model, found, _smooth, calibration.batches[0], "smoothing")
        for text in left_out:
            calibration.note(self.name, text)
        if exact:
            _smooth(model, exact)
            calibration.plan_anew()

    def factors(self, largest: Tensor) -> Tensor:
        """What the channels (C,) are divided by, from the largest value of each."""
        median = largest.median()
        if median == 0:
            return torch.ones_like(largest)
        return (largest / median).clamp(LEAST, self.most) ** self.strength


def _smooth(model: nn.Module, found: Mapping[str, tuple[str, Tensor]]) -> None:
    """Divide what the GELUs give by factors, and multiply the weights behind; by path of the GELU, with the layer's."""
    put_factors(model, [(gelu, len(factors)) for gelu, (_, factors) in found.items()])
    for gelu, (second, factors) in found.items():
        smoothed: Any = model.get_submodule(gelu)
        weight: Any = model.get_submodule(second).weight
        smoothed.factors.copy_((1 / factors).to(weight.dtype))
        weight.copy_(weight.double() / smoothed.factors.double())  # of the factors as they are used
