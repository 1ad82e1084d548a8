"""GPLQ, stage 1: activations are quantized in training, weights only afterwards.

"GPLQ: A General, Practical, and Lightning QAT Method for Vision Transformers" (Liang et al. 2025, arXiv 2506.11784,
section 3.2). Weights are trained in float at a low learning rate, so that they stay near the given ones; weights that
nothing rounds do not oscillate. The paper's second stage is another one's post-training quantization of the weights;
here they are rounded to the nearest level, on ranges by the scheme's observer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Product
from planish.network.batches import call_model, split_batch, to_device
from planish.qat.method import Context, Method
from planish.training import Ingredient
from planish.training.engine import begin_epoch, gather_rows
from planish.training.loop import Run


def principal_components(features: Tensor, variance: float) -> tuple[Tensor, Tensor]:
    """The mean of features (images, n) and the fewest principal components that explain a share of their variance.

    Returns:
        ``mu`` of n values and ``V`` of (n, components), its columns orthonormal.
    """
    mean = features.mean(0)
    _, values, rows = torch.linalg.svd((features - mean).float(), full_matrices=False)
    explained = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    count = int((explained < variance).sum()) + 1
    return mean, rows[:count].T.contiguous()


def mimicry(student: Tensor, teacher: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """``mean over images of |(f_s - mu) V - (f_t - mu) V|^2`` (equation 2); the mean cancels out and is left out."""
    return ((student - teacher) @ components).square().sum(-1).mean()


def penultimate(layers: Sequence[Product]) -> str:
    """The path of the last layer, whose input is the features."""
    for product in reversed(layers):
        if any(site.slot == "input" for site in product.sites):
            return product.module
    raise PlanishError("the network has no linear layer or convolution whose input could be its features")


class FeatureMimicry(Ingredient):
    """``weight * mimicry`` of the input of the last layer; the components are those of the teacher's features.

    Args:
        teacher: the network in float.
        path: the last layer, in both networks.
        variance: the share of the variance of the teacher's features that the components explain.
        images: how many training images the components are computed from, at most.
    """

    def __init__(
        self, teacher: nn.Module, path: str, weight: float = 1.0, variance: float = 0.6, images: int = 2048
    ) -> None:
        if weight < 0:
            raise PlanishError(f"the weight of the feature mimicry is mimic={weight}: it is positive, or 0 for none")
        if not 0 < variance <= 1:
            raise PlanishError(f"the components are to explain {variance} of the variance: give a share in (0, 1]")
        self.teacher, self.path = teacher.eval().requires_grad_(False), path
        self.weight, self.variance, self.images = weight, variance, images
        self.mean = self.components = torch.empty(0)
        self.features: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def _keep(self, whose: str) -> Any:
        def keep(module: nn.Module, args: Any) -> None:
            self.features[whose] = args[0].flatten(1).float()

        return keep

    def start(self, run: Run) -> None:
        for whose, model in (("student", run.model), ("teacher", self.teacher)):
            self.handles.append(model.get_submodule(self.path).register_forward_pre_hook(self._keep(whose)))
        self.mean, self.components = principal_components(self._sample(run), self.variance)

    def _sample(self, run: Run) -> Tensor:
        """The teacher's features of the first images of the loader, the same in every process."""
        begin_epoch(run.loader, 0, run.settings.seed)  # and after an interruption
        seen: list[Tensor] = []
        for share in run.loader:
            self._watch(run, split_batch(to_device(share.batch, run.accelerator.device))[0])
            seen.append(gather_rows(self.features.pop("teacher")[: share.own], run.accelerator))
            if sum(len(part) for part in seen) >= self.images:
                break
        return torch.cat(seen)[: self.images]

    @torch.no_grad()
    def _watch(self, run: Run, inputs: Any) -> None:
        with run.accelerator.autocast():
            call_model(self.teacher, inputs)

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        self._watch(run, inputs)

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
        student, teacher = self.features["student"], self.features["teacher"]
        return self.weight * mimicry(student, teacher, self.mean, self.components)

    def finish(self, run: Run) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.features = [], {}


@dataclass(frozen=True)
class GPLQ(Method):
    """Activations with learned steps, weights in float until they are rounded at the end.

    The paper trains for one epoch, at a learning rate of 5e-6 (AdamW, batch 128).

    Attributes:
        mimic: weight of the feature mimicry.
        variance: the share of the variance of the float network's features that is mimicked.
    """

    name: ClassVar[str] = "gplq"
    summary: ClassVar[str] = "activations quantized in training, weights rounded afterwards"
    paper: ClassVar[str] = "Liang et al. 2025, arXiv 2506.11784"

    weights: str = "later"
    mimic: float = 1.0
    variance: float = 0.6

    def ingredients(self, context: Context) -> list[Ingredient]:
        parts = super().ingredients(context)
        if self.mimic:
            path = penultimate(context.layers())
            parts.append(FeatureMimicry(context.channel_teacher(self.name), path, self.mimic, self.variance))
        return parts
