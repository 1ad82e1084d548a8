"""The reconstruction engine: unit by unit, roundings and steps are learned so that outputs are the float network's."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.network.batches import first_image, map_tensors, size_of, tensors_of
from planish.network.units import LAYERS, find_units, join_units
from planish.ptq.cutmix import cutmix
from planish.ptq.flow import Flow, Suffix
from planish.ptq.learners import Learner, get_learner
from planish.ptq.objectives import check_objective, make_objective
from planish.ptq.outputs import count_holders, keep_float
from planish.ptq.passes import Calibration
from planish.ptq.precision import check_precision
from planish.ptq.shelf import Shelf
from planish.ptq.unit_learning import Settings, UnitLearning

COST = 8.0  # of an iteration in every unit, in passes of the float network; measured, for the estimate


@dataclass(frozen=True)
class Reconstruct(Settings):
    """Learn the roundings of the weights and the steps of the activations, unit by unit, from the first to the last.

    A network that was calibrated and rounded goes in (``FoldBatchNorm``, ``Calibrate``, and ``Round`` or ``GPTQ``). In
    each unit the squared error of its output against the float network's is minimised over the calibration images, with
    inputs as the units before it, already reconstructed, give them. The blocks are those of BRECQ (arXiv 2102.05426),
    the random dropping of activation rounding is QDrop's (arXiv 2203.05740), the roundings are AdaRound's (arXiv
    2004.10568), Genie-M's (arXiv 2212.04780), straight-through ones (GLF-Q) or SignRound's (arXiv 2309.05516).

    Attributes:
        learner: how roundings are learned: a key of ``planish.ptq.learners.LEARNERS``.
        loss: what is minimised: a key of ``planish.ptq.objectives.OBJECTIVES``.
        travel: how far a rounding may come in all (``Learner.travel``); ``None``: the learner's own.
        layers: units with at most so many layers stay whole (``find_units``); 1: layer by layer.
        joint: so many adjacent pairs of units are reconstructed together, those that differ most in size (MRECG).
        memory: gigabytes of cached inputs and outputs that are held in memory; the rest goes into temporary files.
        cutmix: images with a rectangle from another one (CutMix, arXiv 1905.04899) that are calibrated on beside the
            given ones, as a share of their number, up to 1.
    """

    name: ClassVar[str] = "reconstruct"

    learner: str = "genie"
    loss: str = "local"
    travel: float | None = None
    layers: int = LAYERS
    joint: int = 0
    memory: float = 4.0
    cutmix: float = 0.0

    def __call__(self, calibration: Calibration) -> None:
        learner = self._checked()
        teacher = keep_float(calibration)
        products = calibration.assignment.products
        example = first_image(calibration.batches[0])
        units = join_units(find_units(teacher, example, products, layers=self.layers), products, self.joint)
        shelf = Shelf(self.memory * 1e9)
        batches = [*calibration.batches, *self._mixed(calibration.batches)]
        flow = Flow(calibration.model, teacher, units, batches, shelf)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self._walk(calibration, flow, learner)
        finally:
            shelf.close()

    def _checked(self) -> Learner:
        check_objective(self.loss)
        check_precision(self.precision)
        if not 0 <= self.cutmix <= 1:
            raise PlanishError(f"cutmix is {self.cutmix}: the share of mixed images lies in [0, 1]")
        if not 0 <= self.drop < 1:
            raise PlanishError(f"drop is {self.drop}: the share of values that are not rounded lies in [0, 1)")
        for what, value in (("iterations", self.iterations), ("batch", self.batch), ("memory", self.memory)):
            if value <= 0:
                raise PlanishError(f"the {what} of a reconstruction is {value}: give a positive number")
        if self.joint < 0:
            raise PlanishError(f"joint is {self.joint}: give the number of pairs that are reconstructed together, or 0")
        if self.layers < 1:
            raise PlanishError(f"layers is {self.layers}: a unit that stays whole has at least 1 layer")
        travels = self.activation_travel, 1.0 if self.travel is None else self.travel
        if not all(0 <= travel < math.inf for travel in travels):
            raise PlanishError(f"travel is {self.travel}, activation_travel {self.activation_travel}: give 0 or more")
        learner = get_learner(self.learner)
        return learner if self.travel is None else replace(learner, travel=self.travel)

    def _mixed(self, batches: list[Any]) -> list[Any]:
        """The mixed images: so many of the given batches, and of the last one its first images."""
        generator = torch.Generator().manual_seed(self.seed)
        left, mixed = round(self.cutmix * sum(size_of(batch) for batch in batches)), []
        for batch in batches:
            count = min(left, size_of(batch))
            if count:
                mixed.append(map_tensors(batch, lambda t, n=count: cutmix(t, generator)[:n]))  # type: ignore[misc]
            left -= count
        return mixed

    def _walk(self, calibration: Calibration, flow: Flow, learner: Learner) -> None:
        began, units = time.perf_counter(), [i for i in range(len(flow.units)) if self._low(calibration, flow, i)]
        if not units:
            return
        if self.loss != "local" and any(len(tensors_of(batch)) > 1 for batch in flow.batches):
            raise PlanishError(
                f"loss {self.loss} runs what follows a unit on what that unit gives alone, and this network has "
                "several inputs: take loss local"
            )
        self._estimate(calibration, flow, len(units) / len(flow.units))
        suffix_parts = self._reference(calibration, flow) if self.loss != "local" else None
        fixed = self._fixed(calibration, flow)
        for index, unit in enumerate(flow.units):
            data = flow.data(index)
            if data is None:
                calibration.note(self.name, f"{unit.name} cannot be run alone: its weights are rounded to nearest")
                continue
            if index in units:
                work = UnitLearning(self, learner, calibration, flow, index, data, fixed)
                kept = f"{calibration.place}-{self.name}-{index}"
                if not work.learns:
                    calibration.note(self.name, f"{unit.name} has nothing to learn: it stays as it was rounded")
                elif (done := calibration.journal.get(kept)) is not None:
                    work.restore(done)
                else:
                    suffix = Suffix(flow, index, *suffix_parts) if suffix_parts else None
                    before, after = work.learn(make_objective(self.loss, flow, index, data, suffix))
                    calibration.journal.put(kept, work.outcome())
                    calibration.record(
                        event="unit", **{"pass": self.name}, unit=unit.name, before=before, after=after,
                        seconds=time.perf_counter() - began,
                    )  # fmt: skip
                calibration.progress((units.index(index) + 1) / len(units))
            flow.advance(index, data)

    def _fixed(self, calibration: Calibration, flow: Flow) -> set[str]:
        """The names of the weights that stay as they were rounded, with a note for each reason.

        What one unit learns of a weight that others read as well would be wrong for them, and a weight with a scale for
        each group of its inputs has no learner.
        """
        model, plan = calibration.model, calibration.assignment
        holders = count_holders(model)
        readers: dict[str, set[int]] = defaultdict(set)
        for index, unit in enumerate(flow.units):
            for product in plan.products:
                if product.name in unit.products:
                    for site in product.sites:
                        readers[site.name].add(index)
        fixed: dict[str, list[str]] = defaultdict(list)
        for site, fmt in plan.quantized():
            if site.parameter and fmt.bits < 8:
                shared = holders[id(model.get_submodule(site.owner)._parameters[site.slot])] > 1
                why = "has a scale for each group of its inputs" if fmt.granularity == "group" else ""
                why = "is shared by several layers" if shared or len(readers[site.name]) > 1 else why
                if why:
                    fixed[why].append(site.name)
        for why, names in fixed.items():
            others = f", and so do {len(names) - 1} others" if len(names) > 1 else ""
            calibration.note(self.name, f"{names[0]} {why}: it stays as it was rounded{others}")
        return {name for names in fixed.values() for name in names}

    def _estimate(self, calibration: Calibration, flow: Flow, share: float) -> None:
        """Say, before it starts, about how long it will take and how much the caches hold."""
        images = map_tensors(flow.batches[0], lambda t: t[: self.batch])
        flow.all_logits(images)
        began = time.perf_counter()
        flow.all_logits(images)
        forward = time.perf_counter() - began
        rows = [torch.Size(unit.shape[1:]).numel() for unit in flow.units]
        most = max(now + 4 * before for before, now in zip([0, *rows], rows, strict=False))
        calibration.record(
            event="estimate", **{"pass": self.name}, units=len(flow.units),
            seconds=share * self.iterations * forward * (COST if self.loss in ("local", "fisher", "lsh") else 2 * COST),
            megabytes=most * flow.images * 4e-6, held_megabytes=self.memory * 1e3,
        )  # fmt: skip

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
            logits = torch.cat([flow.all_logits(batch) for batch in flow.batches])
        finally:
            handle.remove()
        return last, logits, torch.cat(kept)
