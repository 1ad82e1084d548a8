"""The one training loop.

Everything random in a step is drawn from generators seeded by (seed, step), so that a run continued from a checkpoint,
or one with an ingredient that draws nothing, computes exactly what the uninterrupted or plain run computes.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from planish.errors import PlanishError
from planish.network.batches import call_model, logits_of, split_batch, to_device
from planish.training import checkpoint
from planish.training.engine import begin_epoch, equalize_buffers, make_accelerator, make_optimizer, step_seed
from planish.training.ingredients import Ingredient

CHECKPOINT_MINUTES = 10.0  # so much work is lost at most by a kill -9, beside what an epoch's end keeps
LOG_EVERY = 20  # steps between two lines of the log


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast. ``None`` means: chosen from the model (SGD if it has BatchNorm, else AdamW).

    Attributes:
        epochs: passes over the loader.
        optimizer: ``"sgd"`` (momentum 0.9, Nesterov), ``"adamw"`` or ``"auto"``.
        lr: peak learning rate; by default 0.02 for SGD and 5e-4 for AdamW.
        weight_decay: on tensors of two or more dimensions; by default 5e-4 for SGD and 0.05 for AdamW.
        warmup: share of the steps in which the learning rate rises linearly.
        final_lr: what the cosine ends at, as a share of ``lr``.
        clip_norm: gradients are scaled down to this norm; ``None``: never.
        freeze_batchnorm: BatchNorm normalizes by its running statistics and leaves them as they are, as it will when
            the network is used; its scales and shifts are trained. With batch statistics a network does not learn to
            bear a shifted mean, because each batch takes the shift out again.
        quantizer_lr: learning rate of the parameters of quantizers, as a share of the others'.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        seed: of everything random in the loop.
    """

    epochs: int = 4
    optimizer: str = "auto"
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float = 0.05
    final_lr: float = 0.0
    clip_norm: float | None = 1.0
    freeze_batchnorm: bool = True
    quantizer_lr: float = 1.0
    mixed_precision: str = "no"
    seed: int = 0

    def learning_rate(self, step: int, steps: int, peak: float) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to ``final_lr * peak``."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        part = (step - warmup) / max(1, steps - warmup)
        return peak * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * part)))


@dataclass
class Run:
    """What ingredients may look at while a model is trained."""

    model: nn.Module  # as the user knows it
    wrapped: nn.Module  # as the accelerator runs it
    accelerator: Accelerator
    settings: TrainingSettings
    steps: int  # in all
    loader: Any
    step: int = 0
    failed: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    log: Callable[[dict[str, Any]], None] = lambda event: None

    @property
    def progress(self) -> float:
        """Share of the steps that are done, in [0, 1]."""
        return self.step / self.steps


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; what is needed to resume is in the checkpoint, if there is one."""


class TrainingFailed(PlanishError):
    """The loss became NaN or infinite; ``state_dict`` holds the last good weights, also restored in the model."""

    def __init__(self, message: str, state_dict: dict[str, Tensor]) -> None:
        super().__init__(message)
        self.state_dict = state_dict


def train(
    model: nn.Module,
    loader: Iterable[Any],
    ingredients: Sequence[Ingredient],
    settings: TrainingSettings,
    *,
    accelerator: Accelerator | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    resume: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Train ``model`` in place on ``loader`` with a list of ingredients.

    Args:
        model: any module whose output :func:`planish.network.batches.logits_of` understands.
        loader: batches of (inputs, labels), with a length; a sampler or data set with ``set_epoch`` is told the epoch.
        checkpoint_dir: where the state is saved after every epoch, and when ``should_stop`` says so.
        checkpoint_minutes: within an epoch it is saved whenever the last time is so long ago; no result depends on it.
        resume: continue from ``checkpoint_dir`` if there is a checkpoint.
        progress: called after each step with (step, steps, loss).
        log: receives an event of plain values for every epoch, and every ``LOG_EVERY`` steps one with the loss, the
            learning rate and what the ingredients report. What a resumed run computes again it tells again.
        should_stop: asked after each step; if true, a checkpoint is written and :class:`Interrupted` raised.

    Raises:
        PlanishError: there is nothing to train on or nothing to minimise, or the checkpoint is of no use.
        TrainingFailed: the loss is no longer finite; the model holds the last good weights.
        Interrupted: ``should_stop`` asked for it.
    """
    if settings.epochs < 0 or not isinstance(loader, Sized):
        raise PlanishError(
            f"training needs a number of epochs that is not negative, got {settings.epochs}, "
            f"and a loader with a length, got a {type(loader).__name__}"
        )
    accelerator = accelerator or make_accelerator(settings.mixed_precision)
    optimizer, peak = make_optimizer(model, settings)
    wrapped, prepared, batches = accelerator.prepare(model, optimizer, loader)
    _unwrap(model)
    steps = settings.epochs * len(batches)
    if steps == 0 and settings.epochs > 0:
        raise PlanishError(
            "the training loader yields no batch: give it images, or a batch size no larger than their number"
        )
    run = Run(model, wrapped, accelerator, settings, max(steps, 1), batches, log=log or (lambda event: None))
    _move(ingredients, model, accelerator)
    stepper = Stepper(run, prepared, peak, list(ingredients))
    state = (model, prepared, ingredients)
    known = {**asdict(settings), "steps": run.steps}  # what the rest of the run depends on
    saver = functools.partial(checkpoint.save, checkpoint_dir, *state, accelerator, settings=known)
    clock = _Clock(60 * checkpoint_minutes)
    good = _snapshot(model)
    began = time.perf_counter()
    try:
        for ingredient in ingredients:
            ingredient.start(run)
        if resume and checkpoint_dir is not None and checkpoint.exists(checkpoint_dir):
            run.step = checkpoint.load(checkpoint_dir, *state, settings=known)
            good = _snapshot(model)
        stepper.set_modes()
        for epoch in range(run.step // max(1, len(batches)), settings.epochs):
            begin_epoch(batches, epoch, settings.seed)
            done = run.step - epoch * len(batches)
            for batch in _skip(accelerator, batches, done) if done else batches:
                loss = stepper(batch)
                run.step += 1
                stepper.tell(loss)
                if progress:
                    progress(run.step, run.steps, loss)
                stop, due = _agree([should_stop(), clock.due()], accelerator)
                if (stop or due) and run.step % len(batches):  # at the end of an epoch it is saved anyway
                    _check_finite(model)
                    saver(run.step)
                    clock.start()
                    if stop:
                        raise Interrupted
            run.history.append({"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - began})
            run.log({"event": "epoch", **run.history[-1]})
            _check_finite(model)
            good = _snapshot(model)
            saver(run.step)
            clock.start()
            if stop:
                raise Interrupted
    except FloatingPointError as error:
        run.failed = True
        model.load_state_dict(good, strict=False)
        where = (
            f"; the checkpoint of the last good epoch is in {checkpoint_dir}"
            if checkpoint_dir is not None and checkpoint.exists(checkpoint_dir)
            else ""
        )
        raise TrainingFailed(
            f"the loss became {error} at step {run.step + 1} of {run.steps}: training stopped and the last good "
            f"weights were kept{where}; lower the learning rate ({peak:g}) or look for bad values in the images",
            good,
        ) from None
    except BaseException:
        run.failed = True
        raise
    finally:
        for ingredient in ingredients:
            ingredient.finish(run)
        optimizer.zero_grad(set_to_none=True)
    equalize_buffers(model, accelerator)
    return run


class Stepper:
    """One step: ingredients around forward and backward, then the optimizer."""

    def __init__(self, run: Run, optimizer: Any, peak: float, ingredients: list[Ingredient]) -> None:
        self.run, self.optimizer, self.peak, self.ingredients = run, optimizer, peak, ingredients
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]

    def set_modes(self) -> None:
        """Training mode, but for BatchNorm if the settings freeze it."""
        self.run.model.train()
        if self.run.settings.freeze_batchnorm:
            for module in self.run.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def __call__(self, batch: Any) -> float:
        run = self.run
        torch.manual_seed(step_seed(run.settings.seed, run.step, run.accelerator.process_index))
        lr = run.settings.learning_rate(run.step, run.steps, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        inputs, labels = split_batch(to_device(batch, run.accelerator.device))
        for ingredient in self.ingredients:
            ingredient.before_step(run, inputs, labels)
        compute: Callable[[], Tensor] = functools.partial(self._compute, inputs, labels)
        for ingredient in reversed(self.ingredients):
            compute = functools.partial(ingredient.around, run, compute)
        loss = compute().item()
        if not math.isfinite(loss):
            raise FloatingPointError(loss)
        if run.settings.clip_norm is not None:
            run.accelerator.clip_grad_norm_(self.parameters, run.settings.clip_norm)
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

    def _compute(self, inputs: Any, labels: Tensor | None) -> Tensor:
        run = self.run
        with run.accelerator.autocast():
            logits = logits_of(call_model(run.wrapped, inputs)).float()
            given = [ingredient.loss(run, inputs, labels, logits) for ingredient in self.ingredients]
        terms = [term for term in given if term is not None]
        if not terms:
            raise PlanishError(
                "there is nothing to minimise: give the training a task loss, a distillation or another term"
            )
        loss = torch.stack(terms).sum()
        shown = loss.detach()
        if run.accelerator.num_processes > 1:
            # all processes go on, or none does: one that stopped alone would leave the others waiting
            shown = run.accelerator.reduce(shown, "mean")
        if torch.isfinite(shown):
            run.accelerator.backward(loss)
        return shown


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _check_finite(model: nn.Module) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise FloatingPointError("NaN or infinite in the weights")


def _skip(accelerator: Accelerator, loader: Any, done: int) -> Iterable[Any]:
    if isinstance(loader, DataLoader):
        return accelerator.skip_first_batches(loader, done)
    return itertools.islice(loader, done, None)


class _Clock:
    """When the next checkpoint within an epoch is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start()

    def start(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.since >= self.seconds


def _agree(flags: list[bool], accelerator: Accelerator) -> list[bool]:
    """For each flag whether any process has set it; processes that parted would wait for each other."""
    if accelerator.num_processes == 1:
        return flags
    told: Tensor = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device))
    return (told > 0).tolist()


def _move(ingredients: Sequence[Ingredient], model: nn.Module, accelerator: Accelerator) -> None:
    for ingredient in ingredients:
        teacher = getattr(ingredient, "teacher", None)
        if isinstance(teacher, nn.Module):
            teacher.to(accelerator.device)


def _unwrap(model: nn.Module) -> None:
    """Take off what accelerate leaves on a model: the loop has autocast, and an instance's forward hides taps."""
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        model.__dict__.pop("forward", None)
    model.__dict__.pop("_is_accelerate_prepared", None)
