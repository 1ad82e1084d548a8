"""``planish.flatten``: a trained network in, the same network in a flatter place out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.flattening.activation_noise import ActivationNoise
from planish.flattening.weight_noise import WeightNoise
from planish.network import Assignment, assign, reestimate_batchnorm, watch
from planish.network.batches import first_image, split_batch, to_device
from planish.network.coverage import check_patterns
from planish.scheme import Scheme
from planish.task import FEATURES, say_task, task_of
from planish.training import (
    SAM,
    Averaging,
    Distillation,
    GradientL1,
    Ingredient,
    Kurtosis,
    OutputError,
    TaskLoss,
    TrainingSettings,
    make_accelerator,
    train,
)
from planish.training.engine import equalize_buffers, step_seed
from planish.training.loop import CHECKPOINT_MINUTES


@dataclass(frozen=True)
class FlattenSettings:
    """What the flattening of a network depends on, beside the scheme.

    The ingredients :class:`WeightNoise` and :class:`ActivationNoise` have defaults of their own: used directly, they
    draw Gaussian noise, measure the error every 20 steps and perturb every step (``share`` 1) until 0.9 of the run.

    Attributes:
        weight_noise: a key of ``planish.flattening.weight_noise.KINDS``.
        activation_noise: a key of ``planish.flattening.activation_noise.KINDS``.
        weight_gain: size of the noise on weights as a multiple of the recorded error's.
        activation_gain: the same for activations; noise of kind ``residual`` has no gain there.
        part: share of the weights that ``residual`` rounds at a time.
        activation_part: share of the layers whose inputs ``residual`` rounds at a time.
        clip_weights, clip_activations: clip to the quantizer's range before the noise is added.
        nonzero_only: no activation noise where a value is exactly zero.
        start, until: the shares of the run between which there is noise; the rest trains without.
        share: part of the steps in between that are perturbed; the others hold the full-precision network in place.
        refresh: steps between two measurements of the quantization error.
        sam: radius of sharpness-aware minimization; 0: none.
        adaptive_sam: its scale-invariant form (ASAM).
        kurtosis: weight of :class:`planish.training.Kurtosis` (KURE); 0: none.
        gradient_l1: weight of :class:`planish.training.GradientL1`; 0: none.
        averaging: decay of the moving average of the weights, ``None``: none.
        equal_averaging: an equal average of all weights instead (SWA).
        averaging_start: share of the run from which on the equal average is taken.
        task: weight of the cross-entropy with the labels; 0 reads no labels.
        label_smoothing: share of the target that is spread evenly over all classes.
        distillation: weight of the divergence from the given network's outputs; one more forward pass a step.
        temperature: of both distributions in the distillation.
        output_error: weight of the mean squared error between the given and the perturbed outputs (the objective of
            arXiv 2511.01462); one more forward pass a step.
        reestimate_batches: batches over which BatchNorm statistics are re-estimated afterwards, if they were not frozen
            and anything but plain training was done.
        training: epochs, optimizer, learning rate, precision, seed.
    """

    weight_noise: str = "residual"
    activation_noise: str = "residual"
    weight_gain: float = 1.0
    activation_gain: float = 1.0
    part: float = 0.7
    activation_part: float = 0.5
    clip_weights: bool = False
    clip_activations: bool = True
    nonzero_only: bool = True
    start: float = 0.0
    until: float = 0.9
    share: float = 0.6
    refresh: int = 40
    sam: float = 0.0
    adaptive_sam: bool = False
    kurtosis: float = 0.0
    gradient_l1: float = 0.0
    averaging: float | None = 0.998
    equal_averaging: bool = False
    averaging_start: float = 0.0
    task: float = 1.0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 1.0
    output_error: float = 0.0
    reestimate_batches: int = 50
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def imitates(self) -> bool:
        """Whether any step imitates the errors of a quantizer, for which every product has to be in reach."""
        weights = self.clip_weights or (self.weight_noise != "none" and self.weight_gain > 0)
        activations = self.activation_noise == "residual" or (
            self.activation_noise != "none" and self.activation_gain > 0
        )
        return weights or activations or self.clip_activations

    @property
    def perturbs(self) -> bool:
        """Whether a step is anything but that of plain training."""
        return self.imitates or self.sam > 0 or self.kurtosis > 0 or self.gradient_l1 > 0

    @property
    def averages(self) -> bool:
        """Whether what comes back is an average of weights."""
        return self.averaging is not None or self.equal_averaging


def plain(training: TrainingSettings | None = None, **changes: Any) -> FlattenSettings:
    """Plain fine-tuning in the same loop: no noise, no clipping, no average; the base of every comparison."""
    off = FlattenSettings(weight_noise="none", activation_noise="none", clip_activations=False, averaging=None)
    return replace(off, training=training or TrainingSettings(), **changes)


def flatten(
    model: nn.Module,
    loader: Iterable[Any],
    scheme: Scheme | str | Sequence[Scheme | str] = "w4a4",
    *,
    settings: FlattenSettings | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    allow: Iterable[str] = (),
    task: str | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    resume: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train a copy of ``model`` under the errors that quantizing it to ``scheme`` would make (DNQ, arXiv 2511.01462).

    Args:
        model: a trained network in float; it is left untouched.
        loader: training batches of (inputs, labels).
        scheme: the quantization to prepare for, or several, of which each step imitates one. Nothing is quantized: the
            schemes' errors are measured and imitated.
        settings: what noise, what objective, how long; ``epochs`` and ``seed`` override its training settings.
        allow: shell patterns of products that may stay in float.
        task: what the outputs mean (:mod:`planish.task`): ``classes`` (the default), ``labels`` or ``features``. These
            are held to those of the given network; labels are not read then.
        checkpoint_dir, checkpoint_minutes, resume, progress, log, should_stop: as in :func:`planish.training.train`.

    Returns:
        A network of the same class with the same state_dict keys: clean weights, in evaluation mode. Without noise,
        clipping, SAM and averaging it is bit for bit what plain fine-tuning gives.

    Raises:
        PlanishError: a product that no tap covers, an empty loader, an unknown option, a loss that is not finite.
    """
    settings = settings or FlattenSettings()
    given: dict[str, Any] = {"epochs": epochs, "seed": seed}
    training = replace(settings.training, **{k: v for k, v in given.items() if v is not None})
    settings = replace(settings, training=training)
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    flat = copy.deepcopy(model)
    say_task(flat, task)
    accelerator = make_accelerator(training.mixed_precision)
    flat.to(accelerator.device)
    batch = next(iter(loader), None)
    if batch is None:
        raise PlanishError("the training loader yields no batch: give it at least one image")
    schemes = [scheme] if isinstance(scheme, (str, Scheme)) else list(scheme)
    _check(settings, schemes)
    plans: list[Assignment] = []
    if settings.imitates or allow:
        example = first_image(to_device(split_batch(batch)[0], accelerator.device))
        watched = watch(flat, example)
        check_patterns(watched, allow)
        if settings.imitates:  # else nothing is tapped, so nothing has to be in reach
            plans = [assign(watched, one, allow=allow) for one in schemes]
    if task_of(flat) is FEATURES:
        settings = replace(settings, task=0.0, distillation=settings.distillation or settings.task)
    ingredients = make_ingredients(settings, model, plans)
    train(
        flat, loader, ingredients, training, accelerator=accelerator, checkpoint_dir=checkpoint_dir,
        checkpoint_minutes=checkpoint_minutes, resume=resume, progress=progress, log=log, should_stop=should_stop,
    )  # fmt: skip
    if training.epochs and (settings.perturbs or settings.averages) and not training.freeze_batchnorm:
        # the same batches in every process, also where the loader shuffles by the global generator
        torch.manual_seed(step_seed(training.seed, -1))
        clean = (to_device(split_batch(b)[0], accelerator.device) for b in islice(loader, settings.reestimate_batches))
        reestimate_batchnorm(flat, clean)
        equalize_buffers(flat, accelerator)
    return flat.eval()


def _check(settings: FlattenSettings, schemes: Sequence[Scheme | str]) -> None:
    if not schemes and settings.imitates:
        raise PlanishError("there is no scheme to flatten for: give one, such as w4a4, or several")
    for name in ("weight_gain", "activation_gain", "reestimate_batches"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise PlanishError(f"{name} is {getattr(settings, name)}: give 0 or more")


def make_ingredients(settings: FlattenSettings, model: nn.Module, plans: Sequence[Assignment]) -> list[Ingredient]:
    """The ingredients that the settings name, in the order in which the loop runs them."""
    s, seed = settings, settings.training.seed
    ingredients: list[Ingredient] = []
    if s.sam:
        ingredients.append(SAM(s.sam, s.adaptive_sam))
    schedule: dict[str, Any] = {
        "start": s.start,
        "until": s.until,
        "share": s.share,
        "refresh": s.refresh,
        "seed": seed,
    }
    if s.output_error:
        ingredients.append(OutputError(copy.deepcopy(model), s.output_error))
    if plans and (s.weight_noise != "none" or s.clip_weights):
        ingredients.append(
            WeightNoise(plans, s.weight_noise, gain=s.weight_gain, part=s.part, clip=s.clip_weights, **schedule)
        )
    if plans and (s.activation_noise != "none" or s.clip_activations):
        activations = ActivationNoise(
            plans, s.activation_noise, gain=s.activation_gain, clip=s.clip_activations, nonzero_only=s.nonzero_only,
            part=s.activation_part, **schedule,
        )  # fmt: skip
        ingredients.append(activations)
    if s.task:
        ingredients.append(TaskLoss(s.task, s.label_smoothing))
    if s.kurtosis:
        ingredients.append(Kurtosis(s.kurtosis))
    if s.gradient_l1:
        ingredients.append(GradientL1(s.gradient_l1))
    if s.distillation:
        ingredients.append(Distillation(copy.deepcopy(model), s.distillation, s.temperature))
    if not (s.task or s.distillation or s.output_error):
        raise PlanishError("there is nothing to minimise: give task, distillation or output_error a weight above 0")
    if s.averages:
        decay = None if s.equal_averaging else s.averaging
        ingredients.append(Averaging(decay, s.averaging_start))
    return ingredients
