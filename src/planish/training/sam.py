"""Sharpness-aware minimization: the gradient at the worst nearby point, at twice the cost of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.modes import frozen_statistics
from planish.training.ingredients import Compute, Ingredient
from planish.training.loop import Run
from planish.training.sharding import local, norm


class SAM(Ingredient):
    """Gradient at ``w + rho g / |g|`` (Foret et al. 2021, arXiv 2010.01412), or its scale-invariant form.

    ``adaptive=True`` is ASAM (Kwon et al. 2021, arXiv 2102.11600): the step is ``rho T^2 g / |T g|`` with
    ``T = |w| + eta``. BatchNorm keeps the running statistics of the first pass, at the weights themselves.
    """

    sharded = True

    def __init__(self, rho: float = 0.05, adaptive: bool = False, eta: float = 0.01) -> None:
        if rho <= 0:
            raise PlanishError(f"rho of SAM is {rho}: the radius of the neighbourhood is positive")
        self.rho, self.adaptive, self.eta = rho, adaptive, eta

    def around(self, run: Run, compute: Compute) -> Tensor:
        loss = compute()
        if not torch.isfinite(loss):
            return loss
        weights = [p for p in run.model.parameters() if p.grad is not None]
        here = [local(w.detach()) for w in weights]
        clean = [w.clone() for w in here]
        try:
            with torch.no_grad():
                torch._foreach_add_(here, self.ascent(weights))
            for w in weights:
                w.grad = None
            with frozen_statistics(run.model):
                worst = compute()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(here, clean)
        return loss if torch.isfinite(worst) else worst

    @torch.no_grad()
    def ascent(self, weights: list[nn.Parameter]) -> list[Tensor]:
        """The step to the worst point within ``rho``, from the gradients at hand; of split weights this part's."""
        gradients = [w.grad for w in weights if w.grad is not None]
        if not self.adaptive:
            length = norm(gradients) + 1e-12
            return [local(g) * (self.rho / length) for g in gradients]
        # biases and norms have no scale of their own to be invariant to: T = 1 there, as in the authors' code
        scale = [w.abs() + self.eta if w.dim() > 1 else torch.ones_like(w) for w in weights]
        scaled = [t * g for t, g in zip(scale, gradients, strict=True)]
        length = norm(scaled) + 1e-12
        return [local(t) * local(tg) * (self.rho / length) for t, tg in zip(scale, scaled, strict=True)]
