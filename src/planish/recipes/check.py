"""Refuse what cannot work before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

from planish.errors import PlanishError
from planish.flattening.activation_noise import KINDS as ACTIVATION_KINDS
from planish.flattening.weight_noise import KINDS as WEIGHT_KINDS
from planish.network.half import check_constants
from planish.ptq import get_method
from planish.ptq.precision import check_precision
from planish.recipes.arms import ARMS
from planish.recipes.config import ModelOptions, NoiseOptions, RecordOptions, RunConfig, TrainOptions
from planish.recipes.tracking import check_trackers
from planish.scheme import Scheme

MAX_SEED = 2**26 - 1  # the seed of a step is made of it and fits 64 bits


def check_run(config: RunConfig) -> RunConfig:
    """The same settings with the schemes' names spelled as planish spells them; raises PlanishError for bad ones."""
    if not config.arms:
        raise PlanishError(f"no arm to run: choose from {', '.join(ARMS)}")
    for arm in config.arms:
        _one_of("arm", arm, ARMS)
    for method in config.methods:
        get_method(method)
    check_models(config.models)
    if any(ARMS[arm].cost for arm in config.arms):
        check_training(config.train, config.noise)
    if config.quantize.calibration_images < 1:
        raise PlanishError(f"calibration-images is {config.quantize.calibration_images}: give at least 1")
    if config.quantize.iterations is not None and config.quantize.iterations < 1:
        raise PlanishError(f"iterations is {config.quantize.iterations}: give at least 1")
    check_constants(config.quantize.constants)
    check_precision(config.quantize.precision)
    if not config.quantize.memory > 0:
        raise PlanishError(f"memory is {config.quantize.memory}: give gigabytes, more than 0")
    schemes, prepare = _names(config.schemes), _names(config.prepare)
    if "flat" in config.arms and not (prepare or schemes):
        raise PlanishError("no scheme to flatten for: give --schemes, or --prepare")
    return replace(config, schemes=schemes, prepare=prepare or schemes, record=check_record(config.record))


def _names(schemes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(Scheme.parse(scheme).name for scheme in schemes))


def check_record(options: RecordOptions) -> RecordOptions:
    """The same, with trackers separated by commas told apart; raises PlanishError for one that cannot be used."""
    if not options.checkpoint_minutes >= 0:
        raise PlanishError(f"checkpoint-minutes is {options.checkpoint_minutes}: give a number of minutes from 0 on")
    track = tuple(dict.fromkeys(part for text in options.track for part in text.split(",") if part))
    check_trackers(track)
    return replace(options, track=track)


def check_models(options: ModelOptions) -> None:
    """Raise PlanishError for numbers that no batch, process or generator can have."""
    for name, value, least in (
        ("batch-size", options.batch_size, 1), ("workers", options.workers, 0), ("threads", options.threads, 0),
    ):  # fmt: skip
        if value < least:
            raise PlanishError(f"{name} is {value}: give at least {least}")
    if not 0 <= options.seed <= MAX_SEED:
        raise PlanishError(f"seed is {options.seed}: give a whole number from 0 to {MAX_SEED}")


def check_training(train: TrainOptions, noise: NoiseOptions) -> None:
    """Raise PlanishError for settings with which nothing can be trained."""
    if train.epochs < 1:
        raise PlanishError(f"epochs is {train.epochs}: training needs at least 1")
    if train.lr is not None and not (math.isfinite(train.lr) and train.lr > 0):
        raise PlanishError(f"lr is {train.lr}: the learning rate is a number above 0")
    if train.weight_decay is not None and not (math.isfinite(train.weight_decay) and train.weight_decay >= 0):
        raise PlanishError(f"weight-decay is {train.weight_decay}: it is a number from 0 on")
    for name, share in (("warmup", train.warmup), ("final-lr", train.final_lr)):
        if not 0 <= share <= 1:
            raise PlanishError(f"{name} is {share}: it is a share, from 0 to 1")
    if train.accumulation < 1:
        raise PlanishError(f"accumulation is {train.accumulation}: a batch is computed in 1 or more parts")
    _one_of("optimizer", train.optimizer, ("auto", "sgd", "adamw"))
    _one_of("mixed-precision", train.mixed_precision, ("no", "bf16", "fp16"))
    _one_of("weight-noise", noise.weight_noise, WEIGHT_KINDS)
    _one_of("activation-noise", noise.activation_noise, ACTIVATION_KINDS)
    weights = {"labels": noise.labels, "distillation": noise.distillation, "output-error": noise.output_error}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise PlanishError(f"{name} is {weight}: its weight is a number from 0 on")
    if not any(weights.values()):
        raise PlanishError("labels is 0, and so is all else to learn from: give --distillation 1, which reads none")


def _one_of(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise PlanishError(f"{what} {name!r} is not known: choose from {', '.join(known)}")
