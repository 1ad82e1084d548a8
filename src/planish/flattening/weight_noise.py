"""Noise on the weights, of the size of the error that rounding them would make (WQER)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.flattening.pool import NoisePool
from planish.flattening.recorders import ErrorRecorder
from planish.flattening.schedule import Schedule
from planish.functional import fake_quantize
from planish.network import Assignment
from planish.training.ingredients import Compute, Ingredient
from planish.training.loop import Run
from planish.training.sharding import local, part_like, whole

KINDS = {
    "none": "no weight noise",
    "iid": "a fresh Gaussian is added to the weights at every update: perturbed gradient descent",
    "differential": "the increment d_t - d_(t-1) enters the update: Anti-PGD, the reading of DNQ",
    "differential-forward": "loss and gradient at w + (d_t - d_(t-1)); the weights themselves stay clean",
    "uniform": "loss and gradient at w + U(-s/2, s/2), s the quantizer's step",
    "residual": "loss and gradient with a random part of the weights truly rounded",
}


class WeightNoise(Ingredient):
    """One switch over the laws of weight noise; see ``KINDS``.

    ``differential`` is Anti-PGD (Orvieto et al. 2022, arXiv 2202.02831), ``w <- w - lr g(w) + d_t - d_(t-1)``. It is
    computed in the variable ``z = w - d``, in which it reads ``z <- z - lr g(z + d_t)``: the same iterates exactly
    (tested against the literal form), but the model holds clean weights all the time, so that averages, checkpoints
    and the end of the noise need no correction. Weight decay therefore acts on the clean weights.

    Args:
        assignment: which parameters are quantized, and how; of several, each step imitates one at random.
        kind: a key of ``KINDS``.
        gain: the noise's standard deviation as a multiple of the recorded one.
        part: share of the weights that ``residual`` rounds.
        clip: evaluate at weights clipped to the quantizer's range.
        start, until, share, refresh, seed: see :class:`~planish.flattening.schedule.Schedule`.
    """

    sharded = True

    def __init__(
        self, assignment: Assignment | Sequence[Assignment], kind: str = "differential", *, gain: float = 1.0,
        part: float = 0.5, clip: bool = False, start: float = 0.0, until: float = 0.9, share: float = 1.0,
        refresh: int = 20, seed: int = 0,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise PlanishError(f"weight noise is {kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < part <= 1:
            raise PlanishError(f"part of the weights to round is {part}: give a share in (0, 1]")
        if kind == "iid" and clip:
            raise PlanishError("weight noise iid is added at the update, so there is nothing to clip: leave clip out")
        self.assignments = (assignment,) if isinstance(assignment, Assignment) else tuple(assignment)
        self.kind, self.gain, self.part, self.clip = kind, gain, part, clip
        self.schedule = Schedule(start, until, share, refresh, seed)
        self.levels: list[_Level] = []
        self.level = _Level([], [])
        self.previous: list[Tensor] | None = None  # d_(t-1)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that this step perturbs."""
        return self.level.parameters

    @property
    def recorders(self) -> list[ErrorRecorder]:
        """Their recorders, under the scheme of this step."""
        return self.level.recorders

    def active(self, run: Run) -> bool:
        """Whether this step is perturbed."""
        return (self.kind != "none" or self.clip) and self.schedule.active(run)

    def start(self, run: Run) -> None:
        self.levels = [_Level.of(run.model, assignment) for assignment in self.assignments]
        self.level = self.levels[0]
        law = "uniform" if self.kind == "uniform" else "gaussian"
        # the same seed on every rank: the weights must stay equal
        self.pool = NoisePool(law, self.schedule.seed, run.accelerator.device)
        self.previous = None
        run.log({"event": "noise", "on": "weights", "kind": self.kind, "seeds": [self.schedule.seed]})

    @torch.no_grad()
    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        if not self.active(run):
            return
        self.level = self.levels[self.schedule.pick(run, len(self.levels))]
        if self.schedule.due(run, self.level.measured):
            self.level.measured = run.step
            for parameter, recorder in zip(self.parameters, self.recorders, strict=True):
                recorder.measure(whole(parameter.detach()))
        self.pool.renew(run.step)

    def draw(self) -> list[Tensor]:
        """One d for every parameter: centred, with the recorded deviation (or step) of each output channel."""
        # The recorded mean is left out: it would cancel in every increment.
        size = (lambda r: r.step / 12**0.5) if self.kind == "uniform" else (lambda r: r.deviation)
        return [self.pool.like(p) * (self.gain * size(r)) for p, r in zip(self.parameters, self.recorders, strict=True)]

    @torch.no_grad()
    def perturbation(self) -> list[Tensor]:
        """What is added to each (clipped) weight for this step's forward and backward pass; of split weights the part
        that this process has."""
        if self.kind == "residual":
            # the pool's normal numbers choose which weights are rounded: z < Phi^-1(part)
            threshold = NormalDist().inv_cdf(self.part) if self.part < 1 else math.inf
            return [self._residual(p, r, threshold) for p, r in zip(self.parameters, self.recorders, strict=True)]
        noise = self.draw()
        previous, self.previous = self.previous, noise if self.kind == "differential-forward" else None
        if previous is not None:
            noise = list(torch._foreach_sub(noise, previous))
        return [part_like(d, p) for d, p in zip(noise, self.parameters, strict=True)]

    def _residual(self, parameter: Tensor, recorder: ErrorRecorder, threshold: float) -> Tensor:
        assert recorder.grid is not None
        weight = whole(parameter.detach())
        error = fake_quantize(weight, recorder.grid).sub_(weight)
        # zeros and ones: to multiply by booleans takes ten times as long
        error.mul_(torch.lt(self.pool.like(weight), threshold, out=torch.empty_like(weight)))
        return part_like(error if self.gain == 1 else error.mul_(self.gain), parameter)

    def around(self, run: Run, compute: Compute) -> Tensor:
        if not self.active(run) or self.kind == "iid":
            return compute()
        with torch.no_grad():
            weights = [local(p.detach()) for p in self.parameters]
            clean = [weight.clone() for weight in weights]
            if self.clip:
                for weight, parameter, recorder in zip(weights, self.parameters, self.recorders, strict=True):
                    low, high = (part_like(end.expand_as(parameter), parameter) for end in recorder.limits())
                    weight.clamp_(low, high)
            if self.kind != "none":
                torch._foreach_add_(weights, self.perturbation())
        try:
            return compute()
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, clean)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if self.kind == "iid" and self.active(run):
            noise = [part_like(d, p) for d, p in zip(self.draw(), self.parameters, strict=True)]
            torch._foreach_add_([local(p.detach()) for p in self.parameters], noise)

    def report(self, run: Run) -> dict[str, float]:
        """``weight_noise``: the error of rounding, under the scheme of this step, as a share of the weights (both by
        their root mean squares), times the gain; absent until it has been measured."""
        if self.level.measured < 0 or self.kind == "none":
            return {}
        errors = [r.variance.expand_as(p).sum() for p, r in zip(self.parameters, self.recorders, strict=True)]
        squares = [p.detach().square().sum() for p in self.parameters]
        return {"weight_noise": self.gain * math.sqrt(float(sum(errors)) / max(float(sum(squares)), 1e-30))}

    def state_dict(self) -> dict[str, Any]:
        levels = [[level.measured, [r.state_dict() for r in level.recorders]] for level in self.levels]
        return {"levels": levels, "pool": self.pool.state_dict(), "previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for level, (measured, recorders) in zip(self.levels, state["levels"], strict=True):
            level.measured = measured
            for parameter, recorder, saved in zip(level.parameters, level.recorders, recorders, strict=True):
                recorder.load_state_dict(saved, parameter.device)
        self.pool.load_state_dict(state["pool"])
        previous = state["previous"]
        self.previous = None if previous is None else [d.to(self.pool.device) for d in previous]


@dataclass
class _Level:
    """The weights that one scheme quantizes, and their recorders."""

    parameters: list[nn.Parameter]
    recorders: list[ErrorRecorder]
    measured: int = -1  # step of the last measurement

    @classmethod
    def of(cls, model: nn.Module, assignment: Assignment) -> _Level:
        sites = [(site, fmt) for site, fmt in assignment.quantized() if site.parameter]
        parameters = [model.get_submodule(site.owner).get_parameter(site.slot) for site, _ in sites]
        return cls(parameters, [ErrorRecorder(fmt, channel_axis=site.channel_axis) for site, fmt in sites])
