"""Noise on what enters the matrix products, of the size of the error that rounding it would make (AQER)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.flattening.pool import NoisePool, grouped
from planish.flattening.recorders import ErrorRecorder, gather_samples, part_of_sample, sample_activation
from planish.flattening.schedule import Schedule
from planish.functional import fake_quantize
from planish.network import Assignment, Site, attach, detach
from planish.scheme import Format
from planish.training.engine import any_process
from planish.training.ingredients import Ingredient
from planish.training.loop import Run

INNER = 0.2  # how often an attention's probabilities are rounded when its other operands are

KINDS = {
    "none": "no activation noise (the range may still be clipped)",
    "gaussian": "normal, with the recorded variance of the quantization error",
    "uniform": "U(-s/2, s/2), s the quantizer's step",
    "residual": "the input of a random part of the layers is truly rounded, a new part at every step",
}


class _Rounding(torch.autograd.Function):
    """Fake quantization by whole-tensor operations in place, for one scale held as a plain number.

    PyTorch's own fused kernel does the same at a quarter of the speed on a CPU, because it is not vectorized.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, least: int, most: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = ((least - 0.5) * step, (most + 0.5) * step)
        return torch.div(x, step).round_().clamp_(least, most).mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, x, *ctx.limits), None, None, None


@dataclass
class _Level:
    """The recorder of a site under one scheme, and the plain numbers that the hot path reads."""

    recorder: ErrorRecorder
    low: float = 0.0
    high: float = 0.0
    sigma: float = 0.0
    step: float = 1.0
    zero_point: int = 0
    due: bool = False  # to be measured at the next step that allows it

    @property
    def several(self) -> bool:
        """Whether there are several scales, as for tokens or heads."""
        return self.recorder.format.granularity != "tensor"

    def take(self, sigma: float) -> None:
        low, high = self.recorder.limits()
        self.low, self.high, self.sigma = low.min().item(), high.max().item(), sigma
        if self.recorder.step.numel() == 1:
            assert self.recorder.grid is not None
            self.step, self.zero_point = self.recorder.step.item(), int(self.recorder.grid.zero_point)

    def numbers(self) -> list[float]:
        return [self.low, self.high, self.sigma, self.step, self.zero_point, self.due]


class NoiseTap(nn.Module):
    """Clips to the quantizer's range and adds noise, in training mode and while ``on``; else the identity."""

    def __init__(
        self, levels: Sequence[_Level | None], owner: ActivationNoise, *, whole: bool = False, inner: bool = False
    ) -> None:
        super().__init__()
        self.whole = whole  # a weight made from parameters is measured whole: it has a scale for every channel
        self.inner = inner  # the probabilities of an attention, which its fused kernel does not show
        self.levels = levels
        self.level = next(level for level in levels if level is not None)
        self.owner = owner
        self.on = self.measuring = False
        self.chosen = True  # residual: whether this layer is rounded in this step

    @property
    def recorder(self) -> ErrorRecorder:
        """The recorder under the scheme of this step."""
        return self.level.recorder

    @property
    def idle(self) -> bool:
        """Whether the next tensor would pass unseen and unchanged."""
        if self.measuring:
            return False
        return not (self.on and self.training) or (self.owner.kind == "residual" and not self.chosen)

    def forward(self, x: Tensor) -> Tensor:
        if not self.measuring and not (self.on and self.training):
            return x
        # What a tap computes is no product of the network: the modes that look for them would be asked at every
        # operation, which takes longer than most of these operations.
        with torch._C.DisableTorchFunction():
            if self.measuring:
                self.measure(x)
            return self._perturbed(x) if self.on and self.training and self.recorder.grid is not None else x

    def _perturbed(self, x: Tensor) -> Tensor:
        owner = self.owner
        if owner.kind == "residual":
            return self._round(x) if self.chosen else x
        clipped = self._clip(x) if owner.clip else x
        if owner.kind == "none" or owner.gain == 0:
            return clipped
        view = grouped(clipped)
        noise = owner.pool.like(view if view is clipped else view[0])
        if owner.nonzero_only and self.recorder.nonzero < 0.98:
            # symmetric noise times the sign of x: the same law, and nothing where x is zero
            return torch.addcmul(view, noise.to(x.dtype), view.detach().sign(), value=self.level.sigma).view(x.shape)
        if view.dtype == noise.dtype:
            return torch.add(view, noise, alpha=self.level.sigma).view(x.shape)
        return torch.add(view, noise.to(x.dtype), alpha=self.level.sigma).view(x.shape)

    def _round(self, x: Tensor) -> Tensor:
        """The quantizer itself: straight-through inside the range and no gradient outside."""
        grid = self.recorder.grid
        assert grid is not None
        if grid.scale.numel() > 1 or x.dtype != torch.float32 or grid.offset:
            return fake_quantize(x, grid)
        level = self.level
        least, most = grid.qmin - level.zero_point, grid.qmax - level.zero_point
        rounded: Tensor = _Rounding.apply(x, level.step, least, most)
        return rounded

    def _clip(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.level.low, self.level.high)

    def measure(self, x: Tensor) -> None:
        """Show the recorder a sample; once a step, however often the layer runs.

        The first one counts from now on. Later ones wait for the end of the step, and then count from the next: so the
        processes exchange all of them at once.
        """
        self.measuring = self.level.due = False
        sample = self.owner.sample(x, self)
        if self.whole:
            self.owner.refresh(self.level, sample)
        elif self.recorder.grid is None:
            self.owner.take_in([(self.level, sample)])
        else:  # a copy, which outlives the activation
            self.owner.waiting.append((self.level, sample.clone()))

    def _apply(self, fn: Any, recurse: bool = True) -> NoiseTap:
        return self


class ActivationNoise(Ingredient):
    """Taps every activation site that the scheme quantizes; see ``KINDS``.

    Args:
        assignment: which activations are quantized, and how; of several, each step imitates one at random.
        kind: a key of ``KINDS``.
        gain: the noise's standard deviation as a multiple of the recorded one (``residual`` has none).
        clip: clip to the quantizer's range first, so that training meets the clipping, too, and not only the rounding.
        part: share of the layers that ``residual`` rounds at a time; an attention's probabilities a fifth as often,
            because the fused kernel has to be spelled out for them, which costs several times as much.
        nonzero_only: leave exact zeros (the output of a ReLU) alone: a quantizer with a zero level makes no error
            there.
        start, until, share, refresh, seed: see :class:`~planish.flattening.schedule.Schedule`.
    """

    sharded = True

    def __init__(
        self, assignment: Assignment | Sequence[Assignment], kind: str = "gaussian", *, gain: float = 1.0,
        clip: bool = True, nonzero_only: bool = True, part: float = 0.5, start: float = 0.0, until: float = 0.9,
        share: float = 1.0, refresh: int = 20, seed: int = 0,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise PlanishError(f"activation noise is {kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < part <= 1:
            raise PlanishError(f"part of the layers to round is {part}: give a share in (0, 1]")
        self.assignments = (assignment,) if isinstance(assignment, Assignment) else tuple(assignment)
        self.kind, self.gain, self.clip, self.nonzero_only = kind, gain, clip, nonzero_only
        self.part = part
        self.schedule = Schedule(start, until, share, refresh, seed)
        self.measured = [-1] * len(self.assignments)  # steps of the last measurement, by scheme
        self.measuring = True  # in this step
        self.seeds: list[int] = []  # of the noise of every process
        self.taps: dict[str, NoiseTap] = {}
        self.by_layer: defaultdict[str, list[NoiseTap]] = defaultdict(list)
        self.accelerator: Accelerator
        self.counts: Sequence[int] = ()  # images of every process in the first part of the batch
        self.waiting: list[tuple[_Level, Tensor]] = []  # samples of this step

    def active(self, run: Run) -> bool:
        """Whether this step is perturbed."""
        return self.schedule.active(run)

    def start(self, run: Run) -> None:
        plans = [
            {site.name: fmt for site, fmt in assignment.quantized() if not site.parameter}
            for assignment in self.assignments
        ]

        def make(site: Site) -> nn.Module | None:
            formats = [plan.get(site.name) for plan in plans]
            return self._tap(site, formats) if any(formats) else None

        self.accelerator = run.accelerator
        self.measured = [-1] * len(self.assignments)
        law = "uniform" if self.kind == "uniform" else "gaussian"
        # noise on images is another one in every process, as the images are
        self.seeds = [self.schedule.seed + 7919 * (1 + rank) for rank in range(run.accelerator.num_processes)]
        self.pool = NoisePool(law, self.seeds[run.accelerator.process_index], run.accelerator.device)
        run.log({"event": "noise", "on": "activations", "kind": self.kind, "seeds": self.seeds})
        # a product that nobody knew of is noticed when errors are measured
        taps = attach(run.model, self.assignments[0].products, make, watching=lambda: self.measuring)
        self.taps = {name: tap for name, tap in taps.items() if isinstance(tap, NoiseTap)}
        self.by_layer = defaultdict(list)  # the operands of a layer are rounded together
        for product in self.assignments[0].products:
            for site in product.sites:
                if site.name in self.taps:
                    self.by_layer[site.owner].append(self.taps[site.name])
        run.model.train(run.model.training)

    def _tap(self, site: Site, formats: Sequence[Format | None]) -> NoiseTap:
        def level(fmt: Format) -> _Level:
            return _Level(ErrorRecorder(fmt, channel_axis=site.channel_axis, nonzero_only=self.nonzero_only))

        inner = site.slot.endswith("_probabilities")
        return NoiseTap(
            [None if fmt is None else level(fmt) for fmt in formats], self, whole=site.is_weight, inner=inner
        )

    def before_step(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        active, self.counts, self.waiting = self.active(run), run.counts, []
        scheme = self.schedule.pick(run, len(self.assignments))
        self.measuring = measuring = active and self.schedule.due(run, self.measured[scheme])
        if measuring:
            self.measured[scheme] = run.step
        states = [tap.__dict__ for tap in self.taps.values()]  # nn.Module takes its time with every attribute
        for state in states:
            level = state["levels"][scheme]
            state["on"] = active and level is not None
            if level is not None:
                state["level"] = level
                level.due |= measuring
        if active:
            self.pool.renew(run.step)
            if self.kind == "residual":
                # the same layers in every process: what is then rounded is the whole batch, and recorders are reduced
                draws = random.Random(f"{self.seeds[0]}/{run.step}")
                for taps in self.by_layer.values():
                    draw = draws.random()
                    for tap in taps:
                        tap.__dict__["chosen"] = draw < self.part * (INNER if tap.inner else 1.0)
        for state in states:
            level = state["level"]
            # where they are to be rounded, probabilities are measured in the steps that spell the attention out for it
            wait = state["inner"] and self.kind == "residual" and level.recorder.grid is not None
            state["measuring"] = state["on"] and level.due and (state["chosen"] or not wait)

    def eager(self, run: Run) -> bool:
        return any(tap.on or tap.measuring for tap in self.taps.values())

    def report(self, run: Run) -> dict[str, float]:
        """``activation_noise``: the standard deviation of the error of rounding, the root mean square over the sites
        that have been measured under the scheme of this step; absent while there is none."""
        sizes = [tap.recorder.variance.mean() for tap in self.taps.values() if tap.recorder.grid is not None]
        if not sizes or self.kind == "none":
            return {}
        return {"activation_noise": float(torch.stack(sizes).mean().clamp(min=0).sqrt())}

    def finish(self, run: Run) -> None:
        detach(run.model)
        self.taps, self.by_layer = {}, defaultdict(list)

    def after_step(self, run: Run) -> None:
        waiting, self.waiting = self.waiting, []
        with torch.no_grad():
            self.take_in(waiting)

    def sample(self, x: Tensor, tap: NoiseTap) -> Tensor:
        """What a recorder looks at of ``x``: of several processes each has its part of a sample of the whole batch.

        With several scales a sample is the process's own; a weight that is made from parameters is looked at
        whole and is the same everywhere.
        """
        if tap.whole:
            return x.detach()
        if self.accelerator.num_processes == 1 or tap.level.several:
            return sample_activation(x)
        return part_of_sample(x, self.counts, self.accelerator.process_index)

    def take_in(self, samples: Sequence[tuple[_Level, Tensor]]) -> None:
        """Refresh recorders with samples of all processes."""
        joined = iter(gather_samples([s for level, s in samples if not level.several], self.accelerator))
        for level, sample in samples:
            self.refresh(level, sample if level.several else next(joined), own=level.several)

    def refresh(self, level: _Level, seen: Tensor, *, own: bool = False) -> None:
        """Refresh a recorder, and the plain numbers that the hot path reads.

        Args:
            own: what is seen is this process's own, to be averaged afterwards.
        """
        bad = not torch.isfinite(seen).all()
        # what all processes see alike they judge alike; of its own sample one would leave the others waiting
        if any_process(bad, self.accelerator) if own else bad:
            return  # the loss will say so
        level.recorder.measure(seen)
        if own and self.accelerator.num_processes > 1:
            level.recorder.reduce(self.accelerator)
        size = level.recorder.step / 12**0.5 if self.kind == "uniform" else level.recorder.deviation
        level.take(self.gain * size.mean().item())

    def state_dict(self) -> dict[str, Any]:
        levels = {
            name: [level and [level.recorder.state_dict(), level.numbers()] for level in tap.levels]
            for name, tap in self.taps.items()
        }
        return {"levels": levels, "measured": self.measured, "pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured = list(state["measured"])
        self.pool.load_state_dict(state["pool"])
        for name, tap in self.taps.items():
            for level, saved in zip(tap.levels, state["levels"][name], strict=True):
                if level is not None:
                    level.recorder.load_state_dict(saved[0], self.pool.device)
                    level.low, level.high, level.sigma, level.step, level.zero_point, level.due = saved[1]
