"""The reconstruction engine: unit by unit, roundings and steps are learned so that outputs are the float network's."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, detach, taps_of
from planish.network.batches import first_image
from planish.network.taps import replace_tap
from planish.network.units import LAYERS, find_units
from planish.ptq.flow import Flow, Shelf, Suffix, UnitData
from planish.ptq.learners import Coin, DroppingTap, Learner, SignSGD, SoftRounding, get_learner, mix, penalty_beta
from planish.ptq.objectives import Objective, check_objective, make_objective
from planish.ptq.passes import Calibration
from planish.quantizers import LearnedQuantizer, TrainableQuantizer, UniformQuantizer

PENALTY = 0.01  # weight of the rounding penalty beside a squared error that is 1 at first, for a value of the output


@dataclass(frozen=True)
class Reconstruct:
    """Learn the roundings of the weights and the steps of the activations, unit by unit, from the first to the last.

    A network that was calibrated and rounded goes in (``FoldBatchNorm``, ``Calibrate``, ``Round``). In each unit the
    squared error of its output against the float network's is minimised over the calibration images, with inputs as
    the units before it, already reconstructed, give them. The blocks are those of BRECQ (arXiv 2102.05426), the random
    dropping of activation rounding is QDrop's (arXiv 2203.05740), the roundings are AdaRound's (arXiv 2004.10568),
    Genie-M's (arXiv 2212.04780), straight-through ones (GLF-Q) or SignRound's (arXiv 2309.05516).

    Attributes:
        learner: how roundings are learned: a key of ``planish.ptq.learners.LEARNERS``.
        loss: what is minimised: a key of ``planish.ptq.objectives.OBJECTIVES``.
        drop: share of the activations that pass unrounded while a unit learns, and of its inputs that are exact.
        iterations: for each unit.
        batch: images in an iteration.
        travel: how far a rounding may come in all (``Learner.travel``); ``None``: the learner's own.
        activation_travel: how far the step of an activation may come, as a share of it.
        layers: units with at most so many layers stay whole (``find_units``); 1: layer by layer.
        memory: gigabytes of cached inputs and outputs that are held in memory; the rest goes into temporary files.
        seed: of images, masks and first values.
    """

    name: ClassVar[str] = "reconstruct"

    learner: str = "genie"
    loss: str = "local"
    drop: float = 0.5
    iterations: int = 1000
    batch: int = 32
    travel: float | None = None
    activation_travel: float = 1.0
    layers: int = LAYERS
    memory: float = 4.0
    seed: int = 0

    def __call__(self, calibration: Calibration) -> None:
        learner = self._checked()
        teacher = float_copy(calibration.model)
        products = calibration.assignment.products
        example = first_image(calibration.batches[0])
        units = find_units(teacher, example, products, layers=self.layers)
        shelf = Shelf(self.memory * 1e9)
        flow = Flow(calibration.model, teacher, units, calibration.batches, shelf)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self._walk(calibration, flow, learner)
        finally:
            shelf.close()

    def _checked(self) -> Learner:
        check_objective(self.loss)
        if not 0 <= self.drop < 1:
            raise PlanishError(f"drop is {self.drop}: the share of values that are not rounded lies in [0, 1)")
        for what, value in (("iterations", self.iterations), ("batch", self.batch), ("memory", self.memory)):
            if value <= 0:
                raise PlanishError(f"the {what} of a reconstruction is {value}: give a positive number")
        learner = get_learner(self.learner)
        return learner if self.travel is None else replace(learner, travel=self.travel)

    def _walk(self, calibration: Calibration, flow: Flow, learner: Learner) -> None:
        suffix_parts = self._reference(calibration, flow) if self.loss != "local" else None
        began, units = time.perf_counter(), [i for i in range(len(flow.units)) if self._low(calibration, flow, i)]
        for index, unit in enumerate(flow.units):
            data = flow.data(index)
            if data is None:
                calibration.note(self.name, f"{unit.path} cannot be run alone: its weights are rounded to nearest")
                continue
            if index in units:
                suffix = Suffix(flow, index, *suffix_parts) if suffix_parts else None
                work = _UnitWork(self, learner, calibration, flow, index, data)
                before, after = work.learn(make_objective(self.loss, flow, index, data, suffix))
                done = units.index(index) + 1
                calibration.log.append({
                    "event": "unit", "pass": self.name, "unit": unit.path, "before": before, "after": after,
                    "seconds": time.perf_counter() - began,
                })  # fmt: skip
                calibration.progress(self.name, done / len(units))
            flow.advance(index, data)

    def _low(self, calibration: Calibration, flow: Flow, index: int) -> bool:
        """Whether anything in the unit has fewer than 8 bits; at 8, rounding to nearest leaves nothing to win."""
        inside, formats = set(flow.units[index].products), calibration.assignment.formats
        sites = [s for p in calibration.assignment.products if p.name in inside for s in p.sites]
        return any((fmt := formats[site.name]) is not None and fmt.bits < 8 for site in sites)

    def _reference(self, calibration: Calibration, flow: Flow) -> tuple[str, Tensor, Tensor]:
        """The last layer, the logits of the float network and what enters that layer."""
        last = [p for p in calibration.assignment.products if p.weight is not None][-1].module
        kept: list[Tensor] = []
        handle = flow.teacher.get_submodule(last).register_forward_pre_hook(lambda m, args: kept.append(args[0]))
        try:
            logits = torch.cat([flow.all_logits(batch) for batch in calibration.batches])
        finally:
            handle.remove()
        return last, logits, torch.cat(kept)


def float_copy(model: nn.Module) -> nn.Module:
    """A copy without taps: the network that computes with the latent weights."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    detach(twin)
    return twin


@dataclass
class _UnitWork:
    """The learning of one unit."""

    settings: Reconstruct
    learner: Learner
    calibration: Calibration
    flow: Flow
    index: int
    data: UnitData

    def __post_init__(self) -> None:
        inside, plan = set(self.flow.units[self.index].products), self.calibration.assignment
        self.sites = list({s.name: s for p in plan.products if p.name in inside for s in p.sites}.values())
        self.model = self.calibration.model
        self.given = {name: tap for name, tap in taps_of(self.model) if isinstance(tap, UniformQuantizer)}
        self.device = self.flow.device
        self.coin = Coin(self.settings.drop, self.settings.seed, self.device) if self.settings.drop else None
        self.weights: dict[str, tuple[Site, TrainableQuantizer]] = {}
        self.activations: dict[str, tuple[Site, DroppingTap]] = {}

    def learn(self, objective: Objective) -> tuple[float, float]:
        """Train, fix what was learned; the local error before and after (a sum over values, a mean over images)."""
        before, first = self.error(), self._first(objective)
        self._insert()
        try:
            self._train(objective, first)
        finally:
            self._fix()
        return before, self.error()

    @torch.no_grad()
    def _first(self, objective: Objective) -> float:
        """The loss where every weight is rounded to nearest: soft roundings begin with none."""
        places = torch.arange(min(len(self.data.target), self.settings.batch))
        z = self.flow.run("student", self.index, self.data.quantized[places].to(self.device))
        return max(float(objective(z, self.data.target[places].to(self.device), places)), 1e-30)

    @torch.no_grad()
    def error(self) -> float:
        """The squared error of the unit's output on the first images, as it would be shipped."""
        count = min(len(self.data.target), 256)
        z = self.flow.run("student", self.index, self.data.quantized[:count].to(self.device))
        return float((z - self.data.target[:count].to(self.device)).square().sum() / count)

    def _parameter(self, site: Site) -> nn.Parameter:
        parameter = self.model.get_submodule(site.owner)._parameters[site.slot]
        assert parameter is not None
        return parameter

    def _insert(self) -> None:
        for site in self.sites:
            old = self.given.get(site.name)
            if old is None:
                continue
            if not site.is_weight:
                quantizer = LearnedQuantizer(old.format, per_image=True)
                quantizer.initialize(torch.empty(0), old.grid)
                tap = DroppingTap(quantizer.to(self.device), self.coin)
                self.activations[site.name] = site, tap
                replace_tap(self.model, site, tap)
            elif site.parameter and old.format.granularity != "group" and old.format.bits < 8:
                weight = self._parameter(site)
                made = self.learner.make(old.format, site.channel_axis or 0)
                made.initialize(weight.detach(), old.grid)
                self.weights[site.name] = site, made.to(self.device)
                replace_tap(self.model, site, made)

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Groups of parameters for the optimizer, each with its learning rate."""
        for site, tap in self.weights.values():
            scale = float(tap.grid.scale.mean())
            learned = {name: p for name, p in tap.named_parameters() if p.requires_grad}
            steps = [learned.pop(name) for name in ("scale", "a") if name in learned]
            own: list[Tensor] = list(learned.values())
            if self.learner.moves_weights:
                own = [self._parameter(site).requires_grad_(True)]
            lr = self.learner.travel / self.settings.iterations
            if self.learner.sign:
                yield {"params": own + steps, "lr": lr}
                continue
            yield {"params": own, "lr": lr * (scale if self.learner.moves_weights else 1.0)}
            if steps:
                yield {"params": steps, "lr": self.learner.scale_travel * scale / self.settings.iterations}
        if not self.learner.sign:
            yield from self._steps()

    def _steps(self) -> Iterator[dict[str, Any]]:
        for _, tap in self.activations.values():
            scale = tap.quantizer.scale
            lr = self.settings.activation_travel / self.settings.iterations
            yield {"params": [scale], "lr": lr * float(scale.detach().mean())}

    def _train(self, objective: Objective, first: float) -> None:
        optimizers: list[torch.optim.Optimizer] = []
        if self.learner.sign:
            optimizers.append(SignSGD(list(self._groups()), lr=1.0))
            optimizers.append(torch.optim.Adam(list(self._steps()), lr=1.0, fused=True))
        else:
            optimizers.append(torch.optim.Adam(list(self._groups()), lr=1.0, fused=True))
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        taps = [tap for _, tap in self.weights.values()] + [tap.quantizer for _, tap in self.activations.values()]
        soft = [tap for _, tap in self.weights.values() if isinstance(tap, SoftRounding)]
        total = self.settings.iterations
        for step in range(total):
            for optimizer, own in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, own, strict=True):
                    group["lr"] = rate * self._schedule(step / total)
                optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                loss, size = self._loss(objective)
                loss = loss / first
                beta = penalty_beta(step / total) if soft else None
                if beta is not None:
                    loss = loss + PENALTY * sum(tap.penalty(beta) for tap in soft) / math.sqrt(size)
                if not torch.isfinite(loss):
                    path = self.flow.units[self.index].path
                    raise PlanishError(
                        f"{path}: the loss of its reconstruction is {loss.item()}; give a smaller travel"
                    )
                loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for tap in taps:
                tap.keep_valid()

    def _schedule(self, progress: float) -> float:
        """Linear decay for signs, a cosine for steps and weights that move; roundings keep their rate."""
        if self.learner.sign:
            return 1 - progress
        return 1.0 if self.learner.regularised else 0.5 * (1 + math.cos(math.pi * progress))

    def _loss(self, objective: Objective) -> tuple[Tensor, int]:
        places = torch.randint(len(self.data.target), (self.settings.batch,))
        x = self.data.quantized[places].to(self.device)
        if self.coin is not None:
            x = mix(x, self.data.exact[places].to(self.device), self.coin.mask(x))
        y = self.data.target[places].to(self.device)
        z = self.flow.run("student", self.index, x)
        return objective(z, y, places), y[0].numel()

    @torch.no_grad()
    def _fix(self) -> None:
        """What was learned becomes the weight and the grids of plain quantizers."""
        for site, tap in self.weights.values():
            parameter = self._parameter(site)
            parameter.requires_grad_(False)
            parameter.copy_(tap.latent(parameter))
            replace_tap(self.model, site, tap.baked().to(self.device))
        for site, dropping in self.activations.values():
            replace_tap(self.model, site, dropping.quantizer.baked().to(self.device))
