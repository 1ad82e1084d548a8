"""OFQ: quantized transformers whose weights do not oscillate.

"Oscillation-free Quantization for Low-bit Vision Transformers" (Liu et al. 2023, arXiv 2302.02210): scales that are
statistics of the weights (StatsQ), one weight for query and key, annealing of the undecided weights at the end, learned
shifts around the quantizers of activations, distillation from the float network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from planish.network import reparameterize_query_key
from planish.qat.annealing import ConfidenceGuidedAnnealing
from planish.qat.method import Context, Method
from planish.scheme import Scheme
from planish.training import Ingredient

# The recipes of the authors' code (commit 7ed37d1) for ImageNet, from trained weights: AdamW, cosine to 1e-5, float32.
_SLOW = {"epochs": 300, "batch_size": 560, "lr": 5.47e-4, "weight_decay": 0.05, "warmup_epochs": 5, "mixup": False}
_MIXED = {"epochs": 300, "weight_decay": 0.0, "warmup_epochs": 0, "mixup": True}
RECIPES: dict[str, dict[str, Any]] = {
    "deit-tiny": _SLOW,
    "deit-small-w2a2": _SLOW,
    "deit-small": {**_MIXED, "batch_size": 800, "lr": 3.2e-4},
    "swin-tiny-w2a2": {**_SLOW, "batch_size": 512, "lr": 5e-4},
    "swin-tiny": {**_MIXED, "batch_size": 512, "lr": 2e-4},
}


@dataclass(frozen=True)
class OFQ(Method):
    """StatsQ, query-key reparameterization, shifted activations, distillation, and annealing at the end.

    For 4 bits and fewer: at 8 bits StatsQ's clipping dominates its error (the first and last layer learn their step).

    Attributes:
        query_key: rebuild attention so that the product of query and key weights is quantized, where it can be.
        per_token: a step for each token of an activation, which ties the network to one number of tokens.
        annealing: share of the run, at its end, in which confident weights are frozen; 0 for none.
        band: half-width of the band around a threshold in which a weight is undecided, in steps of the grid.
    """

    name: ClassVar[str] = "ofq"
    summary: ClassVar[str] = "scales from statistics, query and key as one weight, annealing of undecided weights"
    paper: ClassVar[str] = "Liu et al. 2023, arXiv 2302.02210"

    weights: str = "statsq"
    activations: str = "shifted"
    distillation: float = 1.0
    query_key: bool = True
    per_token: bool = False
    annealing: float = 0.1
    band: float = 0.005

    @property
    def averaging_until(self) -> float:
        # an average of weights from before and after would undo the freezing
        return 1.0 - self.annealing

    def adapt(self, scheme: Scheme) -> Scheme:
        scheme = super().adapt(scheme)
        if self.per_token and scheme.activations is not None:
            return replace(scheme, activations=replace(scheme.activations, granularity="token"))
        return scheme

    def restructure(self, model: nn.Module) -> list[str]:
        return reparameterize_query_key(model) if self.query_key else []

    def ingredients(self, context: Context) -> list[Ingredient]:
        parts = super().ingredients(context)
        if self.annealing:
            parts.append(ConfidenceGuidedAnnealing(context, self.band, 1.0 - self.annealing))
        return parts
