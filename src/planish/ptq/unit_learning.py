"""One unit of the network learns its roundings and the steps of its activations."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Site, taps_of
from planish.network.taps import replace_tap
from planish.ptq.flow import Flow, UnitData
from planish.ptq.learners import Coin, DroppingTap, Learner, SignSGD, SoftRounding, mix, penalty_beta
from planish.ptq.objectives import Objective
from planish.ptq.passes import Calibration
from planish.ptq.precision import products_in
from planish.quantizers import LearnedQuantizer, TrainableQuantizer, UniformQuantizer

PENALTY = (
    0.01  # weight of the rounding penalty beside a loss that is 1 with nearest rounding, for a value of the output
)

_RANDOM = "random numbers"


@dataclass(frozen=True)
class Settings:
    """How a unit learns.

    Attributes:
        drop: share of the activations that pass unrounded while a unit learns, and of its inputs that are exact.
        iterations: for each unit.
        batch: images in an iteration.
        activation_travel: how far the step of an activation may come, as a share of it.
        seed: of everything random.
        precision: in which products are computed meanwhile (:func:`~planish.ptq.precision.products_in`).
    """

    drop: float = 0.5
    iterations: int = 1000
    batch: int = 32
    activation_travel: float = 1.0
    seed: int = 0
    precision: str = "float32"


@dataclass
class UnitLearning:
    """The roundings and the steps of one unit are learned.

    Args:
        settings: of the pass.
        learner: how roundings are learned.
        calibration: the network, with a plain quantizer at every site, and its plan.
        flow, index, data: the unit, its inputs and its target.
        fixed: names of weights that stay as they are.
    """

    settings: Settings
    learner: Learner
    calibration: Calibration
    flow: Flow
    index: int
    data: UnitData
    fixed: Collection[str] = ()

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
            with products_in(self.settings.precision):
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

    @property
    def learns(self) -> bool:
        """Whether anything in the unit can be learned."""
        return any(not site.is_weight or self._is_learned(site) for site in self.sites if site.name in self.given)

    def _is_learned(self, site: Site) -> bool:
        return site.parameter and site.name not in self.fixed and self.given[site.name].format.bits < 8

    def _insert(self) -> None:
        for site in self.sites:
            old = self.given.get(site.name)
            if old is None:
                continue
            if not site.is_weight:
                quantizer = LearnedQuantizer(old.format, channel_axis=site.channel_axis or 0, per_image=True)
                quantizer.initialize(torch.empty(0), old.grid)
                tap = DroppingTap(quantizer.to(self.device), self.coin)
                self.activations[site.name] = site, tap
                replace_tap(self.model, site, tap)
            elif self._is_learned(site):
                weight = self._parameter(site)
                made = self.learner.make(old.format, site.channel_axis or 0)
                made.initialize(weight.detach(), old.grid)
                self.weights[site.name] = site, made.to(self.device)
                replace_tap(self.model, site, made)

    def _groups(self) -> Iterator[dict[str, Any]]:
        """Groups of the parameters of weights for the optimizer, each with its learning rate."""
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

    def _steps(self) -> Iterator[dict[str, Any]]:
        for _, tap in self.activations.values():
            scale = tap.quantizer.scale
            lr = self.settings.activation_travel / self.settings.iterations
            yield {"params": [scale], "lr": lr * float(scale.detach().mean())}

    def _train(self, objective: Objective, first: float) -> None:
        optimizers: list[torch.optim.Optimizer] = []
        groups, steps = list(self._groups()), list(self._steps())
        if not self.learner.sign:
            groups += steps
        elif steps:
            optimizers.append(torch.optim.Adam(steps, lr=1.0, fused=True))
        if groups:
            made = SignSGD(groups, lr=1.0) if self.learner.sign else torch.optim.Adam(groups, lr=1.0, fused=True)
            optimizers.append(made)
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
                    path = self.flow.units[self.index].name
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

    def outcome(self) -> dict[str, Tensor]:
        """What was learned, for :meth:`restore`: weights, grids, and where the random numbers have come to."""
        taps = dict(taps_of(self.model))
        found: dict[str, Tensor] = {_RANDOM: torch.get_rng_state()}
        for name, (site, _) in self.weights.items():
            found[f"{name}/value"] = self._parameter(site).detach().clone()
        for name in (*self.weights, *self.activations):
            found |= {f"{name}/{key}": value.clone() for key, value in taps[name].state_dict().items()}
        return found

    @torch.no_grad()
    def restore(self, outcome: Mapping[str, Tensor]) -> None:
        """Leave the unit and the random numbers as :meth:`learn` left them.

        Raises:
            PlanishError: the outcome is not one of this unit.
        """
        sites = {site.name: site for site in self.sites}
        try:
            for name in dict.fromkeys(key.rpartition("/")[0] for key in outcome if key != _RANDOM):
                site, old = sites[name], self.given[name]
                if f"{name}/value" in outcome:
                    self._parameter(site).copy_(outcome[f"{name}/value"])
                tap = UniformQuantizer(old.format, channel_axis=site.channel_axis or 0)
                tap.load_state_dict({key: outcome[f"{name}/{key}"] for key in ("scale", "zero_point")})
                replace_tap(self.model, site, tap.to(self.device))
            torch.set_rng_state(outcome[_RANDOM])
        except (KeyError, RuntimeError) as error:
            path = self.flow.units[self.index].name
            raise PlanishError(
                f"what was kept of {path} does not fit it ({error}): delete the checkpoint to start over"
            ) from None
