"""OFQ: quantized transformers whose weights do not oscillate.

"Oscillation-free Quantization for Low-bit Vision Transformers" (Liu et al. 2023, arXiv 2302.02210): scales that are
statistics of the weights (StatsQ), one weight for query and key, annealing of the undecided weights at the end, learned
shifts around the quantizers of activations, distillation from the float network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from planish.network import reparameterize_query_key
from planish.qat.annealing import ConfidenceGuidedAnnealing
from planish.qat.method import Context, Method
from planish.qat.published import Recipe
from planish.scheme import Scheme
from planish.training import Ingredient, TrainingSettings


def _recipe(batch_size: int, lr: float, weight_decay: float, warmup: int, mixup: str = "") -> Recipe:
    """A recipe of the authors' code (commit 7ed37d1) for ImageNet, from trained weights, in float32.

    Theirs are 300 epochs down to a learning rate of 1e-5, and 30 more with it for the annealing. Here annealing is the
    end of the one training, in which the cosine is near its end as well.
    """
    epochs, annealing = 330, 30
    training = TrainingSettings(
        epochs=epochs, optimizer="adamw", lr=lr, weight_decay=weight_decay, warmup=warmup / epochs, final_lr=1e-5 / lr,
        freeze_batchnorm=False,
    )  # fmt: skip
    besides = ", ".join(filter(None, ["RandAugment", "random erasing", mixup, "no average of the weights"]))
    return Recipe(batch_size, training, {"per_token": True, "annealing": annealing / epochs}, besides)


RECIPES = {
    "DeiT-T": _recipe(560, 5.47e-4, 0.05, 5),
    "DeiT-S at w2a2": _recipe(560, 5.47e-4, 0.05, 5),
    "DeiT-S": _recipe(800, 3.2e-4, 0.0, 0, "mixup, CutMix, each image three times"),
    "Swin-T at w2a2": _recipe(512, 5e-4, 0.05, 5),
    "Swin-T": _recipe(512, 2e-4, 0.0, 0, "mixup, CutMix"),
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
    recipes: ClassVar[Mapping[str, Recipe]] = RECIPES

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
