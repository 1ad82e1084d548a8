"""One step of the training loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import call_model, logits_of, split_batch, to_device
from planish.network.faults import BadBatch, fault_in, going_through
from planish.training.batchnorm import over_all
from planish.training.engine import seed_generators, step_seed
from planish.training.ingredients import Ingredient
from planish.training.sharding import average_whole, clip_gradients, is_split, without_exchange
from planish.training.shares import Share, first_parts

if TYPE_CHECKING:
    from planish.training.loop import Run


LOG_EVERY = 20  # steps between two lines of the log


class Stepper:
    """One step: ingredients around forward and backward of every part of the batch, then the optimizer."""

    def __init__(self, run: Run, optimizer: Any, peak: float, ingredients: list[Ingredient]) -> None:
        self.run, self.optimizer, self.peak, self.ingredients = run, optimizer, peak, ingredients
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.synchronized = run.wrapped  # what exchanges gradients at the end of a backward pass
        self.compiled: Any = torch.compile(run.wrapped) if run.settings.compile else None
        self.over_all = False  # whether statistics of the batch are those of all processes
        self.split = any(is_split(p) for p in self.parameters)
        self.fault: str | None = None  # of the batch at hand

    def set_modes(self) -> None:
        """Training mode, but for BatchNorm if the settings freeze it."""
        self.run.model.train()
        norms = [m for m in self.run.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.run.settings.freeze_batchnorm:
            for norm in norms:
                norm.eval()
        self.over_all = self.run.accelerator.num_processes > 1 and any(norm.training for norm in norms)

    def __call__(self, share: Share) -> float:
        run = self.run
        self._seed(0)
        lr = run.settings.learning_rate(run.step, run.steps, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        share = replace(share, batch=to_device(share.batch, run.accelerator.device))
        inputs, labels = split_batch(share.batch)
        self.fault = fault_in(inputs)
        # as many parts in every process, each with an image: they wait for each other in the last one
        processes = run.accelerator.num_processes
        parts = share.split(min(run.settings.accumulation, max(1, share.whole // processes)))
        run.parts, run.counts = len(parts), first_parts(share.whole, processes, len(parts))
        for ingredient in self.ingredients:
            ingredient.before_step(run, inputs, labels)
        if self.compiled is not None:
            eager = self.over_all or any(ingredient.eager(run) for ingredient in self.ingredients)
            run.wrapped = self.synchronized if eager else self.compiled
        self.fresh = True
        compute: Callable[[], Tensor] = functools.partial(self._compute, parts)
        for ingredient in reversed(self.ingredients):
            compute = functools.partial(ingredient.around, run, compute)
        loss = compute().item()
        if not math.isfinite(loss):
            fault = self._fault_of_any()
            raise FloatingPointError(loss) if fault is None else BadBatch(fault)
        if run.settings.clip_norm is not None:
            self._clip(run.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ingredient in self.ingredients:
            ingredient.after_step(run)
        return loss

    def tell(self, loss: float) -> None:
        """Every so many steps, a line with what can be followed; called when the step has been counted."""
        run = self.run
        if run.step % LOG_EVERY and run.step != run.steps:
            return
        lr = run.settings.learning_rate(run.step - 1, run.steps, self.peak)
        told = {name: value for ingredient in self.ingredients for name, value in ingredient.report(run).items()}
        run.log({"event": "step", "step": run.step, "loss": loss, "lr": lr, **told})

    def _fault_of_any(self) -> str | None:
        """What is wrong with the batch, wherever its part lies; the loss is the same everywhere, so all come here."""
        if self.run.accelerator.num_processes == 1:
            return self.fault
        return next((fault for fault in gather_object([self.fault]) if fault is not None), None)

    def _clip(self, most: float) -> None:
        if not self.split:
            self.run.accelerator.clip_grad_norm_(self.parameters, most)
            return
        if getattr(self.run.accelerator, "scaler", None) is not None:
            self.run.accelerator.unscale_gradients(self.optimizer)
        clip_gradients(self.parameters, most)

    def _exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients add up in each process until the last part of a batch."""
        if last:
            return nullcontext()
        return (without_exchange if self.split else self.run.accelerator.no_sync)(self.synchronized)

    def _seed(self, part: int) -> None:
        """What the network draws differs between processes and parts, and is drawn again when a part is repeated."""
        accelerator = self.run.accelerator
        stream = accelerator.process_index + accelerator.num_processes * part
        seed_generators(step_seed(self.run.settings.seed, self.run.step, stream), accelerator.device)

    def _compute(self, parts: list[Share]) -> Tensor:
        """Forward and backward of every part; the mean loss over the whole batch, of all processes."""
        run, shown = self.run, torch.zeros((), device=self.run.accelerator.device)
        for run.part, part in enumerate(parts):
            if len(parts) > 1:
                self._seed(run.part)
            last = run.part + 1 == len(parts)
            with self._exchanging(last):
                with over_all(part.own > 0) if self.over_all else nullcontext():
                    loss = self._loss(*split_batch(part.batch))
                # all processes pass backward, whatever their loss is: one that did not would leave the others waiting
                weight = part.weight * run.accelerator.num_processes  # gradients are averaged over the processes
                run.accelerator.backward(loss if weight == 1 else loss * weight)
            shown += loss.detach() if part.weight == 1 else loss.detach() * part.weight
        self.fresh = False
        if self.fault is not None:
            shown.fill_(math.nan)
        if self.split:
            average_whole(self.parameters, run.accelerator)
        if run.accelerator.num_processes > 1:
            shown = run.accelerator.reduce(shown, "sum")
        return shown

    def _loss(self, inputs: Any, labels: Tensor | None) -> Tensor:
        run = self.run
        if self.fresh or run.parts > 1:
            for ingredient in self.ingredients:
                ingredient.before_part(run, inputs, labels)
        with run.accelerator.autocast():
            with going_through(inputs):
                logits = logits_of(call_model(run.wrapped, inputs)).float()
            given = [ingredient.loss(run, inputs, labels, logits) for ingredient in self.ingredients]
        terms = [term for term in given if term is not None]
        if not terms:
            raise PlanishError(
                "there is nothing to minimise: give the training a task loss, a distillation or another term"
            )
        return torch.stack(terms).sum()
