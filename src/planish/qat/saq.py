"""SAQ: sharpness-aware minimization around the quantized weights.

"Sharpness-aware Quantization for Deep Neural Networks" (Liu et al. 2021, arXiv 2111.12273). SAM's own perturbation of
the latent weights is mostly rounded away, or grows to a whole step; one added to the rounded weights does neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.modes import frozen_statistics
from planish.qat.method import Context, Method
from planish.training import Ingredient
from planish.training.ingredients import Compute
from planish.training.loop import Run


def ascent(gradients: Mapping[str, Tensor], rho: float) -> dict[str, Tensor]:
    """``rho g / |g|``, with the norm over all tensors at once."""
    norm = torch.stack([g.float().norm() for g in gradients.values()]).norm() + 1e-12
    return {name: g * (rho / norm) for name, g in gradients.items()}


class QuantizedSAM(Ingredient):
    """The gradient at ``Q(w) + eps``, ``eps = rho g / |g|``, with g the gradient with respect to ``Q(w)``.

    Two passes: the first gives g at the output of every weight's tap, the second has eps added there and gives the
    gradient for the update. BatchNorm keeps the running statistics of the first.

    Args:
        taps: the taps of the weights, by name of site.
        every: steps from one with two passes to the next; those between are plain steps.
    """

    def __init__(self, taps: Mapping[str, nn.Module], rho: float = 0.02, every: int = 1) -> None:
        if rho <= 0 or every < 1:
            raise PlanishError(
                f"rho of SAQ is {rho}, every {every} steps: the radius is positive and so is the number of steps"
            )
        self.taps, self.rho, self.every = dict(taps), rho, every
        self.outputs: dict[str, list[Tensor]] | None = None
        self.shifts: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def start(self, run: Run) -> None:
        self.handles = [tap.register_forward_hook(self._hook(name)) for name, tap in self.taps.items()]

    def _hook(self, name: str) -> Any:
        def on(tap: nn.Module, args: Any, out: Tensor) -> Tensor:
            if self.outputs is not None and out.requires_grad:
                out.retain_grad()
                self.outputs.setdefault(name, []).append(out)  # a layer that runs twice has two
            return out + self.shifts[name] if name in self.shifts else out

        return on

    def around(self, run: Run, compute: Compute) -> Tensor:
        if run.step % self.every:
            return compute()
        self.outputs = {}
        try:
            loss = compute()
            gradients = self._gradients(run)
        finally:
            self.outputs = None
        if not torch.isfinite(loss) or not gradients:
            return loss
        for parameter in run.model.parameters():
            parameter.grad = None
        self.shifts = ascent(gradients, self.rho)
        try:
            with frozen_statistics(run.model):
                worst = compute()
        finally:
            self.shifts = {}
        return loss if torch.isfinite(worst) else worst

    def _gradients(self, run: Run) -> dict[str, Tensor]:
        """The gradients at the taps' outputs, of the whole batch: all processes go to the same point."""
        found = {}
        for name, outputs in (self.outputs or {}).items():
            parts = [out.grad for out in outputs if out.grad is not None]
            if parts:
                gradient = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
                found[name] = run.accelerator.reduce(gradient, "mean")
        return found

    def finish(self, run: Run) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


@dataclass(frozen=True)
class SAQ(Method):
    """LSQ with the gradient of the worst quantized weights nearby.

    Attributes:
        rho: radius of the neighbourhood, as a norm over all quantized weights (0.3 and 0.4 in the authors' scripts).
        every: steps from one with two passes to the next (1: all).
    """

    name: ClassVar[str] = "saq"
    summary: ClassVar[str] = "sharpness-aware minimization around the quantized weights"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2111.12273"

    rho: float = 0.02
    every: int = 1

    def ingredients(self, context: Context) -> list[Ingredient]:
        taps = {site.name: context.taps[site.name] for site, _ in context.plan.quantized() if site.is_weight}
        return [QuantizedSAM(taps, self.rho, self.every), *super().ingredients(context)]
