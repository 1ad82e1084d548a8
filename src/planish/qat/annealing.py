"""Confidence-guided annealing: in the last part of training only undecided weights may still move.

OFQ (Liu et al. 2023, arXiv 2302.02210, section 4.2). A weight far from every threshold is confident and is frozen; the
others go on until they have settled.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.query_key import QueryKeyAttention
from planish.qat.method import Context
from planish.quantizers import StatsQuantizer
from planish.quantizers.statistics import near_threshold
from planish.training import Ingredient
from planish.training.ingredients import Compute
from planish.training.loop import Run


class ConfidenceGuidedAnnealing(Ingredient):
    """From the share ``start`` of the run on, weights farther than ``band`` steps from a threshold stay as they are.

    Masks are made anew at every step, so a weight that leaves the band freezes. Frozen weights have no gradient and are
    put back after the optimizer's step, which momentum and weight decay would otherwise move them in.

    In a rebuilt attention the value's rows of ``qkv.weight`` are treated likewise. The product of query and key passes
    no gradient where it is confident. Its entries share the rows behind them and, in one row a head, the query's bias,
    which therefore cannot be frozen with the entries one by one; they are put back wherever no undecided entry gave
    them a gradient. So a confident entry may still move with an undecided one of its row or column.

    Weights of the first and last layer, where they have a width of their own, are left alone.
    """

    def __init__(self, context: Context, band: float = 0.005, start: float = 0.9) -> None:
        if band < 0 or not 0 <= start <= 1:
            raise PlanishError(
                f"annealing takes the last {1 - start:g} of the run, with a band of {band} steps: give "
                "annealing in [0, 1] and band >= 0"
            )
        bits = context.plan.scheme.weights.bits
        self.weights = [w for w in context.weights().values() if w[2].format.bits == bits]
        held = {id(tap) for _, _, tap in self.weights}
        taps = [tap for tap in context.taps.values() if isinstance(tap, StatsQuantizer)]
        self.made = [tap for tap in taps if id(tap) not in held]
        attentions = [(n, m) for n, m in context.model.named_modules() if isinstance(m, QueryKeyAttention)]
        # the latent parameters of query and key, with the quantizer of the value's rows; the bias has none
        self.rebuilt: list[tuple[nn.Parameter, Any]] = []
        for path, module in attentions:
            weight, bias = (module.qkv._parameters[name] for name in ("weight", "bias"))
            self.rebuilt.append((cast(nn.Parameter, weight), context.taps.get(f"{path}.linear1_weight")))
            if bias is not None:
                self.rebuilt.append((bias, None))
        self.band, self.begin = band, start
        self.frozen: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, where it is frozen, what it was

    def active(self, run: Run) -> bool:
        """Whether this step is annealed."""
        return run.progress >= self.begin

    @torch.no_grad()
    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        if not self.active(run):
            return
        for tap in self.made:
            tap.band = self.band
        # grids that are statistics follow the weights, whose storage they share
        self.frozen = [(w, ~near_threshold(w, tap.grid, self.band), w.detach().clone()) for _, w, tap in self.weights]
        for latent, quantizer in self.rebuilt:
            frozen = torch.zeros_like(latent, dtype=torch.bool)
            if isinstance(quantizer, StatsQuantizer):
                value = latent.chunk(3)[2]
                frozen.chunk(3)[2].copy_(~near_threshold(value, quantizer.grid, self.band))
            self.frozen.append((latent, frozen, latent.detach().clone()))

    def around(self, run: Run, compute: Compute) -> Tensor:
        loss = compute()
        if self.frozen:
            for latent, _ in self.rebuilt:
                mask = next(mask for parameter, mask, _ in self.frozen if parameter is latent)
                query_key = slice(0, 2 * len(latent) // 3)
                mask[query_key] = True if latent.grad is None else latent.grad[query_key] == 0
        for weight, frozen, _ in self.frozen:
            if weight.grad is not None:
                weight.grad.masked_fill_(frozen, 0.0)
        return loss

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for weight, frozen, clean in self.frozen:
            weight.copy_(torch.where(frozen, clean, weight))
        self.frozen = []

    def finish(self, run: Run) -> None:
        for tap in self.made:
            tap.band = None
        self.frozen = []
