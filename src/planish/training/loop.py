"""The one training loop.

Everything random in a step is drawn from generators seeded by (seed, step), so that a run continued from a checkpoint,
or one with an ingredient that draws nothing, computes exactly what the uninterrupted or plain run computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from planish.errors import PlanishError, waits_for_gradient
from planish.network.faults import BadBatch
from planish.training import checkpoint
from planish.training.engine import (
    any_process,
    any_processes,
    begin_epoch,
    equalize_buffers,
    make_accelerator,
    make_optimizer,
    step_seed,
)
from planish.training.ingredients import Ingredient
from planish.training.sharding import Sharding, asked_for, local, refuse, whole
from planish.training.shares import SharedLoader
from planish.training.step import Stepper

CHECKPOINT_MINUTES = 10.0  # so much work is lost at most by a kill -9, beside what an epoch's end keeps


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast. ``None`` means: chosen from the model (SGD if it has BatchNorm and no LayerNorm; else
    AdamW).

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
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (which needs a device that has it).
        accumulation: parts in which each process computes its share of a batch, one after the other: less memory, the
            same step (but for BatchNorm that normalizes by the images at hand).
        compile: let ``torch.compile`` have the network; steps that are perturbed anew each time run without it.
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
    accumulation: int = 1
    compile: bool = False
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
    loader: Any  # of shares
    step: int = 0
    part: int = 0  # of the batch, of so many
    parts: int = 1
    counts: Sequence[int] = ()  # images that each process has in the first part
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
    """The loss became NaN or infinite, or a batch was of no use.

    ``state_dict`` holds the last good weights, which are also restored in the model.
    """

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
            Of several processes each takes its part of every batch: the batch size is that of all of them together.
        checkpoint_dir: where the state is saved after every epoch, and when ``should_stop`` says so.
        checkpoint_minutes: within an epoch it is saved whenever the last time is so long ago; no result depends on it.
        resume: continue from ``checkpoint_dir`` if there is a checkpoint.
        progress: called after each step with (step, steps, loss).
        log: receives an event of plain values for every epoch, and every ``LOG_EVERY`` steps one with the loss, the
            learning rate and what the ingredients report. What a resumed run computes again it tells again.
        should_stop: asked after each step; if true, a checkpoint is written and :class:`Interrupted` raised.

    Raises:
        PlanishError: there is nothing to train on or nothing to minimise, or the checkpoint is of no use.
        TrainingFailed: the loss is no longer finite, or a batch holds NaN, infinite values, wrong labels or what the
            model cannot take; the model holds the last good weights.
        Interrupted: ``should_stop`` asked for it.
    """
    _check(settings, loader)
    checkpoint.check_place(checkpoint_dir)
    accelerator = accelerator or make_accelerator(settings.mixed_precision)
    split = None
    if asked_for(accelerator):
        refuse(model, ingredients)
        split = Sharding(model, accelerator)
        optimizer, peak = make_optimizer(model, settings)
        wrapped, prepared = model, accelerator.prepare_optimizer(optimizer)
    else:
        optimizer, peak = make_optimizer(model, settings)
        wrapped, prepared = accelerator.prepare(model, optimizer)
    batches = SharedLoader(loader, accelerator.process_index, accelerator.num_processes)
    _unwrap(model)
    steps = settings.epochs * len(batches)
    if steps == 0 and settings.epochs > 0:
        raise PlanishError(
            "the training loader yields no batch: give it images, or a batch size no larger than their number"
        )
    run = Run(model, wrapped, accelerator, settings, max(steps, 1), batches, log=log or (lambda event: None))
    _move(ingredients, model, accelerator)
    stepper = Stepper(run, prepared, peak, list(ingredients))
    keeper = _Keeper(checkpoint_dir, checkpoint_minutes, run, prepared, ingredients)
    try:
        for ingredient in ingredients:
            ingredient.start(run)
        run.log(_seeds(run))
        if resume and keeper.has_one:
            keeper.load()
        stepper.set_modes()
        _walk(run, stepper, keeper, progress or (lambda step, steps, loss: None), should_stop)
    except (FloatingPointError, BadBatch) as error:
        run.failed = True
        model.load_state_dict(keeper.good, strict=False)
        raise _failure(error, run, keeper, peak) from None
    except RuntimeError as error:
        run.failed = True
        if not waits_for_gradient(error):
            raise
        raise PlanishError(
            "a parameter of the network gets no gradient, and the processes wait for it: give parameters that no image "
            "reaches requires_grad_(False), or train in one process"
        ) from error
    except BaseException:
        run.failed = True
        raise
    finally:
        for ingredient in ingredients:
            ingredient.finish(run)
        optimizer.zero_grad(set_to_none=True)
        if split is not None:
            split.undo()
    equalize_buffers(model, accelerator)
    return run


def _check(settings: TrainingSettings, loader: Any) -> None:
    if settings.epochs < 0 or not isinstance(loader, Sized):
        raise PlanishError(
            f"training needs a number of epochs that is not negative, got {settings.epochs}, "
            f"and a loader with a length, got a {type(loader).__name__}"
        )
    if settings.accumulation < 1:
        raise PlanishError(f"accumulation is {settings.accumulation}: a batch is computed in 1 or more parts")


def _walk(
    run: Run, stepper: Stepper, keeper: _Keeper, progress: Callable[[int, int, float], None],
    should_stop: Callable[[], bool],
) -> None:  # fmt: skip
    """All steps that are left, with a checkpoint after every epoch, and within one where it is due or asked for."""
    batches, began = run.loader, time.perf_counter()
    for epoch in range(run.step // max(1, len(batches)), run.settings.epochs):
        begin_epoch(batches, epoch, run.settings.seed)
        for share in batches.begin_at(run.step - epoch * len(batches)):
            loss = stepper(share)
            run.step += 1
            stepper.tell(loss)
            progress(run.step, run.steps, loss)
            stop, due = any_processes([should_stop(), keeper.due()], run.accelerator)
            if (stop or due) and run.step % len(batches):  # at the end of an epoch it is saved anyway
                keeper.save()
                if stop:
                    raise Interrupted
        run.history.append({"epoch": epoch + 1, "loss": loss, "seconds": time.perf_counter() - began})
        run.log({"event": "epoch", **run.history[-1]})
        keeper.save(end_of_epoch=True)
        if stop:
            raise Interrupted


class _Keeper:
    """What is kept of a run: its checkpoint, where there is a folder for it, and the weights of the last good epoch."""

    def __init__(
        self, directory: Path | None, minutes: float, run: Run, optimizer: Any, ingredients: Sequence[Ingredient]
    ) -> None:
        self.directory, self.seconds, self.run = directory, 60 * minutes, run
        self.state = (run.model, optimizer, ingredients)
        self.known = {**asdict(run.settings), "steps": run.steps}  # what the rest of the run depends on
        self.good = _snapshot(run.model)
        self.since = time.monotonic()

    @property
    def has_one(self) -> bool:
        """Whether there is a checkpoint."""
        return self.directory is not None and checkpoint.exists(self.directory)

    def load(self) -> None:
        """Go on where the checkpoint was written."""
        assert self.directory is not None
        self.run.step = checkpoint.load(self.directory, *self.state, settings=self.known)
        self.good = _snapshot(self.run.model)

    def due(self) -> bool:
        """Whether the last checkpoint was written too long ago."""
        return time.monotonic() - self.since >= self.seconds

    def save(self, *, end_of_epoch: bool = False) -> None:
        """Write a checkpoint; raises FloatingPointError instead if the weights are not finite."""
        model, accelerator = self.run.model, self.run.accelerator
        if any_process(not all(local(p).isfinite().all() for p in model.parameters()), accelerator):
            raise FloatingPointError("NaN or infinite in the weights")
        if end_of_epoch:
            self.good = _snapshot(model)
        checkpoint.save(self.directory, *self.state, accelerator, self.run.step, settings=self.known)
        self.since = time.monotonic()


def _failure(error: Exception, run: Run, keeper: _Keeper, peak: float) -> TrainingFailed:
    where = f"; the checkpoint of the last good epoch is in {keeper.directory}" if keeper.has_one else ""
    what, advice = f"the loss became {error}", f"lower the learning rate ({peak:g})"
    if isinstance(error, BadBatch):
        epoch, batch = divmod(run.step, max(1, len(run.loader)))
        what, advice = f"batch {batch + 1} of epoch {epoch + 1} {error}", "correct what the loader gives"
    return TrainingFailed(
        f"{what} at step {run.step + 1} of {run.steps}: training stopped and the last good weights were kept"
        f"{where}; {advice}",
        {key: whole(value) for key, value in keeper.good.items()},
    )


def _seeds(run: Run) -> dict[str, Any]:
    """A line for the log: what everything random in this run follows from."""
    processes, seed = run.accelerator.num_processes, run.settings.seed
    return {
        "event": "seeds", "seed": seed, "processes": processes,
        "first_step": [step_seed(seed, 0, rank) for rank in range(processes)],
    }  # fmt: skip


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


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
