"""Weights that oscillate between two codes while they are trained: counting them, and where weights lie on their grid.

"Overcoming Oscillations in Quantization-Aware Training" (Nagel et al. 2022, arXiv 2203.11086). The straight-through
gradient of a weight whose best value lies between two levels changes its sign at the threshold between them, so the
weight is driven back and forth across it. Any training takes the tracker as a further ingredient::

    tracker = OscillationTracker()
    trained = planish.train(model, loader, "w2a2", extra=[tracker])
    oscillation_report(trained, tracker)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import Grid, quantize
from planish.network import taps_of
from planish.quantizers import LaterQuantizer, TrainableQuantizer
from planish.training import Ingredient
from planish.training.loop import Run
from planish.training.sharding import whole

MOST_BITS = 4  # above, a step is too small for its oscillations to matter (section 3, and the authors' code)


def follow(codes: Tensor, previous: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Which codes have just turned back, and the direction of the latest change of each (section 4.1).

    A code oscillates in a step in which it changes, and in the direction opposite to its previous change.

    Args:
        codes, previous: integer codes after and before the step.
        direction: -1, 0 or 1: where each code went when it last changed; 0: it has not changed yet.

    Returns:
        A boolean mask and the new directions.
    """
    change = (codes - previous).sign()
    return change * direction == -1, torch.where(change != 0, change, direction)


def threshold_distance(weight: Tensor, grid: Grid) -> Tensor:
    """How far each weight is from the nearest threshold between two codes, in steps of the grid.

    0 at a threshold and 0.5 at a level; beyond half a step outside the outermost levels it is more than 0.5.
    """
    position = weight.float() / grid.scale - grid.offset + grid.zero_point
    nearest = (position - 0.5).round().clamp(grid.qmin, grid.qmax - 1) + 0.5
    return (position - nearest).abs()


def threshold_histogram(weight: Tensor, grid: Grid, bins: int = 10) -> Tensor:
    """Shares of the weights by their distance to the nearest threshold: ``bins`` equal parts of [0, 0.5] steps.

    One more share at the end holds what lies beyond the outermost levels. All of them add up to 1.
    """
    distance = threshold_distance(weight, grid).flatten()
    part = (distance * (2 * bins)).long().clamp(max=bins - 1)
    # at a level, rounding of the quotient may leave a little more than 0.5
    part = torch.where(distance > 0.5 + 1e-4, bins, part)
    return torch.bincount(part, minlength=bins + 1) / distance.numel()


@dataclass
class Rounded:
    """A parameter and the tap that rounds it."""

    parameter: nn.Parameter
    tap: Any

    @property
    def latent(self) -> Tensor:
        """What is compared with the thresholds."""
        weight = whole(self.parameter.detach())
        return self.tap.latent(weight).detach() if isinstance(self.tap, TrainableQuantizer) else weight

    @property
    def codes(self) -> Tensor:
        return quantize(self.latent, self.tap.grid)


def rounded_weights(model: nn.Module, most_bits: int = MOST_BITS) -> dict[str, Rounded]:
    """The parameters that are quantized to at most ``most_bits``, by the name of their site; in training or baked."""
    found = {}
    for name, tap in taps_of(model):
        owner, _, slot = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(slot)
        fmt = None if isinstance(tap, LaterQuantizer) else getattr(tap, "format", None)
        if parameter is not None and fmt is not None and fmt.bits <= most_bits and fmt.granularity != "group":
            found[name] = Rounded(parameter, tap)
    return found


class OscillationTracker(Ingredient):
    """Counts how often the codes of the quantized weights turn back; changes nothing.

    The frequency of a weight is the moving average of its oscillations (equation 5): ``f <- m o + (1 - m) f`` after
    every step, with ``o`` 1 or 0.

    Args:
        momentum: m.
        threshold: a weight with a higher frequency counts as oscillating.
        most_bits: weights with more bits are left out.
        report_at: share of the run at which a report is made and kept as ``earlier`` (before annealing, say), and
            counting begins anew, so that the report at the end is of what came after it.
    """

    sharded = True

    def __init__(
        self, momentum: float = 0.01, threshold: float = 0.005, most_bits: int = MOST_BITS,
        report_at: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 < momentum <= 1:
            raise PlanishError(f"the momentum of the oscillation frequency is {momentum}: it lies in (0, 1]")
        self.momentum, self.threshold, self.most_bits = momentum, threshold, most_bits
        self.report_at = report_at
        self.earlier: dict[str, Any] | None = None
        self.weights: dict[str, Rounded] = {}
        self.codes: dict[str, Tensor] = {}
        self.direction: dict[str, Tensor] = {}
        self.frequency: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, run: Run) -> None:
        self.weights = rounded_weights(run.model, self.most_bits)
        self.codes = {name: weight.codes for name, weight in self.weights.items()}
        self.direction = {name: torch.zeros_like(codes) for name, codes in self.codes.items()}
        self.frequency = {name: torch.zeros_like(codes) for name, codes in self.codes.items()}

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, weight in self.weights.items():
            self.update(name, weight.codes)
        self.report_midway(run)

    def report_midway(self, run: Run) -> None:
        """Make the report of ``report_at`` when the run has come there."""
        due = self.report_at is not None and (run.step + 1) / run.steps >= self.report_at
        if due and self.earlier is None and self.weights:
            self.earlier = oscillation_report(run.model, self, most_bits=self.most_bits)
            for counted in (*self.direction.values(), *self.frequency.values()):
                counted.zero_()

    def update(self, name: str, codes: Tensor) -> None:
        """Take in the codes of one layer after a step."""
        turned, self.direction[name] = follow(codes, self.codes[name], self.direction[name])
        self.frequency[name].lerp_(turned.to(codes.dtype), self.momentum)
        self.codes[name] = codes

    def finish(self, run: Run) -> None:
        self.weights = {}  # what was counted stays for the report

    def oscillating(self) -> dict[str, float]:
        """The share of each layer's weights that oscillate."""
        return {name: (f > self.threshold).float().mean().item() for name, f in self.frequency.items()}

    def share(self) -> float:
        """The share of all tracked weights that oscillate; 0 if none is tracked."""
        count = sum(f.numel() for f in self.frequency.values())
        return sum(int((f > self.threshold).sum()) for f in self.frequency.values()) / max(1, count)

    def state_dict(self) -> dict[str, Any]:
        return {
            "codes": self.codes, "direction": self.direction, "frequency": self.frequency, "earlier": self.earlier,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kept in ("codes", "direction", "frequency"):
            mine = getattr(self, kept)
            for name, saved in state[kept].items():
                mine[name].copy_(saved)
        self.earlier = state["earlier"]


@torch.no_grad()
def oscillation_report(
    model: nn.Module, tracker: OscillationTracker | None = None, *, bins: int = 10, most_bits: int = MOST_BITS
) -> dict[str, Any]:
    """Where the weights of a network lie on their grids and, with a tracker, how many of them oscillate.

    Args:
        model: a network in training or one from :func:`planish.qat.train_quantized`.
        tracker: one that was an ingredient of its training.
        bins: see :func:`threshold_histogram`; a heap at the left end is what oscillation leaves behind.

    Returns:
        Plain numbers, ready for JSON: ``weights`` (how many), ``near`` (the share within a tenth of a step of a
        threshold), ``histogram``, with a tracker ``oscillating``, and the same of every layer under ``layers``.
    """
    layers: dict[str, dict[str, Any]] = {}
    oscillating = tracker.oscillating() if tracker is not None else {}
    for name, weight in rounded_weights(model, most_bits).items():
        latent, grid = weight.latent, weight.tap.grid
        layers[name] = {
            "weights": latent.numel(),
            "near": (threshold_distance(latent, grid) <= 0.1).float().mean().item(),
            "histogram": threshold_histogram(latent, grid, bins).tolist(),
        }
        if name in oscillating:
            layers[name]["oscillating"] = oscillating[name]
    if not layers:
        raise PlanishError(f"no weight of the network is quantized to {most_bits} bits or fewer: nothing to report")
    return {**_pooled(list(layers.values())), "layers": layers}


def _pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all weights of the layers."""
    count = sum(row["weights"] for row in rows)
    pooled: dict[str, Any] = {"weights": count}
    for key in ("near", "oscillating"):
        if all(key in row for row in rows):
            pooled[key] = sum(row["weights"] * row[key] for row in rows) / count
    pooled["histogram"] = [
        sum(row["weights"] * row["histogram"][i] for row in rows) / count for i in range(len(rows[0]["histogram"]))
    ]
    return pooled
