"""MEC-Quant: the quantized network keeps the entropy of its representation up (in the manner of arXiv 2509.15514)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, attach
from planish.network.batches import call_model
from planish.qat.coding import check, coding_share, magnitude_groups, unit_rows
from planish.qat.method import Context, Method
from planish.training import Ingredient
from planish.training.loop import Run

TARGETS, VIEWS = ("features", "weights", "both"), ("single", "teacher")


class MaximumEntropyCoding(Ingredient):
    """``-gamma * coding_share`` of the features, of the quantized weights, or of both (the sum).

    Features are what enters the last layer, before its quantizer: (N, d), or every position of (N, ..., d) as a row of
    its own. Rows are grouped by their norms before these are divided out. Weights are the rounded ones, a row for each
    output channel; their share is the mean over the layers. In several processes each takes its part of the batch.

    Args:
        context: of the training.
        gamma: weight of the term, whose size is at most 1 for any m, d and ``eps2``.
        target: ``"features"``, ``"weights"`` or ``"both"``.
        experts, eps2, order: see :func:`planish.qat.coding.coding_length`.
        views: ``"single"``, or ``"teacher"``: the other view of the features is the float network's.
        until: the weight falls linearly, to zero at this share of the run; None: it stays.

    Raises:
        PlanishError: an option is not one of those above, or the last layer has no quantized input.
    """

    def __init__(
        self, context: Context, gamma: float, *, target: str = "features", experts: int = 1, eps2: float = 1.0,
        order: int | None = None, views: str = "single", until: float | None = None,
    ) -> None:  # fmt: skip
        check(eps2, order)
        for what, kind, kinds in (("target", target, TARGETS), ("views", views, VIEWS)):
            if kind not in kinds:
                raise PlanishError(f"the {what} of mec is {kind!r}: choose one of {', '.join(kinds)}")
        if gamma < 0:
            raise PlanishError(f"the weight of mec is gamma={gamma}: it is positive, or 0 for none")
        if experts < 1:
            raise PlanishError(f"mec has {experts} experts: give at least one")
        if until is not None and not 0 < until <= 1:
            raise PlanishError(f"the weight of mec is zero after {until} of the run: give a share in (0, 1], or None")
        self.gamma, self.experts, self.eps2, self.order, self.until = gamma, experts, eps2, order, until
        self.seen: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.weights: dict[str, tuple[Site, nn.Module]] = {}
        self.student_tap: nn.Module | None = None
        self.teacher: nn.Module | None = None
        if target != "features":
            found = context.weights()
            self.weights = {name: (site, tap) for name, (site, _, tap) in found.items() if len(site.shape) > 1}
        if target != "weights":
            self._find_features(context, views)

    def _find_features(self, context: Context, views: str) -> None:
        layer = context.layers()[-1]
        site = next((s for s in layer.sites if s.name in context.taps and not s.is_weight), None)
        if site is None or layer.weight is None:
            raise PlanishError(f"{layer.name}: its input is not quantized, so mec finds no features there")
        self.student_tap = context.taps[site.name]
        # a convolution has its features second, anything else last
        self.feature_axis = 1 if len(layer.weight.shape) > 2 else -1
        if views == "teacher":
            name, self.teacher_tap = site.name, nn.Identity()
            self.teacher = context.channel_teacher("mec").eval().requires_grad_(False)
            paths = {path for path, _ in self.teacher.named_modules()}  # block compensation has added some to the other
            products = [product for product in context.plan.products if product.module in paths]
            attach(self.teacher, products, lambda s: self.teacher_tap if s.name == name else None)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, *output: Tensor) -> None:
            self.seen[name] = output[0] if output else inputs[0]

        return hook

    def start(self, run: Run) -> None:
        if self.student_tap is not None:
            self.handles.append(self.student_tap.register_forward_pre_hook(self._keep("student")))
        if self.teacher is not None:
            self.handles.append(self.teacher_tap.register_forward_pre_hook(self._keep("teacher")))
        for name, (_, tap) in self.weights.items():
            self.handles.append(tap.register_forward_hook(self._keep(f"weight {name}")))

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        if self.teacher is not None:
            with torch.no_grad(), run.accelerator.autocast():
                call_model(self.teacher, inputs)

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        gamma = self.gamma * (1.0 if self.until is None else max(0.0, 1 - run.progress / self.until))
        if not gamma:
            return None
        shares = []
        with torch.autocast(logits.device.type, enabled=False):  # determinants need float32
            if self.student_tap is not None:
                shares.append(self._share(self._rows("student"), self._rows("teacher") if self.teacher else None))
            if self.weights:
                layers = [
                    self._share(self.seen[f"weight {name}"].movedim(site.channel_axis or 0, 0).flatten(1))
                    for name, (site, _) in self.weights.items()
                ]
                shares.append(torch.stack(layers).mean())
            return -gamma * torch.stack(shares).sum()

    def _rows(self, name: str) -> Tensor:
        features = self.seen[name].movedim(self.feature_axis, -1)
        return features.reshape(-1, features.shape[-1])

    def _share(self, rows: Tensor, other: Tensor | None = None) -> Tensor:
        groups = magnitude_groups(rows.float().norm(dim=-1), self.experts) if self.experts > 1 else None
        other = None if other is None else unit_rows(other)
        return coding_share(unit_rows(rows), self.eps2, other=other, groups=groups, order=self.order)

    def after_step(self, run: Run) -> None:
        self.seen.clear()

    def finish(self, run: Run) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.seen.clear()


@dataclass(frozen=True)
class MEC(Method):
    """LSQ with maximum entropy coding. The paper's text was not at hand: which tensors, which experts, how many views
    and all numbers are choices of this project.

    Attributes:
        gamma: weight of the coding length as a share of the largest possible one.
        target: what is coded: ``"features"``, ``"weights"`` or ``"both"``.
        experts: groups by magnitude, each with a coding length of its own.
        eps2: mean squared error allowed for vectors of length 1; small: directions with little energy count as well.
        order: terms of the Taylor series, an even number; None: the exact determinant.
        views: ``"single"``, or ``"teacher"``: coded together with the features of the float network, which also draws
            the two together (all that is left of it for a large ``eps2``). Weights have a single view.
        until: the weight falls linearly, to zero at this share of the run; None: it stays.
    """

    name: ClassVar[str] = "mec"
    summary: ClassVar[str] = "lsq, and the coding length of the representation is kept large"
    paper: ClassVar[str] = "Pang et al. 2025, arXiv 2509.15514, after Liu et al. 2022, arXiv 2210.11464"

    gamma: float = 10.0
    target: str = "features"
    experts: int = 4
    eps2: float = 64.0
    order: int | None = None
    views: str = "teacher"
    until: float | None = None

    def ingredients(self, context: Context) -> list[Ingredient]:
        parts = super().ingredients(context)
        if self.gamma:
            parts.append(
                MaximumEntropyCoding(
                    context, self.gamma, target=self.target, experts=self.experts, eps2=self.eps2, order=self.order,
                    views=self.views, until=self.until,
                )
            )  # fmt: skip
        return parts
