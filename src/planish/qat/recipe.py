"""``planish.train``: train the quantized network itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import (
    Assignment,
    assign,
    detach,
    fold_batchnorm,
    has_folded_batchnorm,
    reestimate_batchnorm,
    unfold_batchnorm,
    watch,
)
from planish.network.batches import first_image, split_batch, to_device
from planish.network.faults import sound
from planish.qat.method import Context, Method
from planish.qat.methods import get_method
from planish.qat.prepare import bake_quantizers, insert_quantizers
from planish.qat.upkeep import Upkeep
from planish.scheme import Scheme
from planish.task import say_task
from planish.training import Averaging, Ingredient, TrainingSettings, make_accelerator, train
from planish.training.engine import begin_epoch, equalize_buffers
from planish.training.loop import CHECKPOINT_MINUTES


@dataclass(frozen=True)
class QATSettings:
    """What quantization-aware training depends on, beside the scheme and the method.

    Attributes:
        averaging: decay of the moving average of weights and step sizes that is handed back, ``None``: the last ones.
        calibration_batches: batches of the training loader on which ranges are set, if no calibration is given.
        reestimate_batches: batches over which BatchNorm statistics are re-estimated afterwards, if they were not frozen
            and the weights are an average.
        training: epochs, optimizer, learning rate, precision, seed.
    """

    averaging: float | None = 0.998
    calibration_batches: int = 4
    reestimate_batches: int = 50
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(freeze_batchnorm=False))


def train_quantized(
    model: nn.Module,
    loader: Iterable[Any],
    scheme: Scheme | str = "w4a4",
    method: Method | str = "lsq",
    *,
    given: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    unlabelled: Iterable[Any] | None = None,
    settings: QATSettings | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    allow: Iterable[str] = (),
    task: str | None = None,
    extra: Iterable[Ingredient] = (),
    checkpoint_dir: Path | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    resume: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train a copy of ``model`` with its quantizers in place; the given one is left untouched.

    Args:
        model: where to start: a trained network in float, as it was given or flattened, or one from
            :func:`planish.quantize`, whose grids are kept as the start.
        loader: training batches of (inputs, labels).
        scheme: ``"w4a4"`` and the like; a quantized ``model`` brings its own, which has to be the same.
        method: a name that ``planish methods`` lists, or a :class:`Method` with options, such as ``FPQ(p=0.3)``.
        given: the network in float that teaches, for methods that distil; default: ``model``, without quantizers.
        calibration: batches on which ranges are set; default: the first of ``loader``.
        unlabelled: batches of images for methods that can use them (``cr``).
        settings: how long, how fast; ``epochs`` and ``seed`` override its training settings.
        allow: shell patterns of products that may stay in float.
        task: what the outputs mean (:mod:`planish.task`): ``classes`` (the default), ``labels`` or ``features``. These
            are held to those of the network in float; labels are not read then.
        extra: further ingredients, after those of the method.
        checkpoint_dir, checkpoint_minutes, resume, progress, log, should_stop: as in :func:`planish.training.train`.

    Returns:
        A quantized model like that of :func:`planish.quantize`: fixed grids, in evaluation mode, without gradients.

    Raises:
        PlanishError: a product that no tap covers, an empty loader, an unknown option, a loss that is not finite.
    """
    settings = settings or QATSettings()
    overrides: dict[str, Any] = {"epochs": epochs, "seed": seed}
    training = replace(settings.training, **{k: v for k, v in overrides.items() if v is not None})
    method = get_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise PlanishError(f"the training method is {method!r}: give the name of one, or an object such as FPQ(p=0.3)")
    if unlabelled is not None and not method.takes_unlabelled:
        raise PlanishError(f"{method.name} takes no images without labels: leave unlabelled out, or train by cr")
    accelerator = make_accelerator(training.mixed_precision)
    student, teacher = copy.deepcopy(model).to(accelerator.device), _in_float(given or model).to(accelerator.device)
    say_task(student, task)
    begin_epoch(calibration or loader, 0, training.seed)
    batches = _inputs(calibration or loader, None if calibration else settings.calibration_batches, accelerator.device)
    plan = _plan(student, method, scheme, batches[0], allow)
    taps = insert_quantizers(student, batches, plan, method)
    if has_folded_batchnorm(student):
        fold_batchnorm(teacher, batches[0])  # a negative scale, folded, changes the sign of a channel
    if not training.freeze_batchnorm:
        unfold_batchnorm(student, batches)
    context = Context(student, teacher, plan, taps, training.seed, unlabelled)
    # the upkeep comes first: what others see after a step is valid
    ingredients = [Upkeep(taps), *method.ingredients(context), *extra]
    if settings.averaging is not None and method.averaging_until > 0:
        ingredients.append(Averaging(settings.averaging, until=method.averaging_until))
    train(
        student, loader, ingredients, training, accelerator=accelerator, checkpoint_dir=checkpoint_dir,
        checkpoint_minutes=checkpoint_minutes, resume=resume, progress=progress, log=log, should_stop=should_stop,
    )  # fmt: skip
    if training.epochs and settings.averaging is not None and not training.freeze_batchnorm:
        begin_epoch(loader, 0, training.seed)  # the same batches in every process, and after an interruption
        reestimate_batchnorm(student, _inputs(loader, settings.reestimate_batches, accelerator.device))
        equalize_buffers(student, accelerator)
    bake_quantizers(student, plan, batches[0])
    return student


def _inputs(loader: Iterable[Any], most: int | None, device: torch.device) -> list[Any]:
    batches = [to_device(split_batch(batch)[0], device) for batch in sound(islice(loader, most), "calibration")]
    if not batches:
        raise PlanishError("the loader yields no batch to set ranges on: give it at least one image")
    return batches


def _plan(student: nn.Module, method: Method, scheme: Scheme | str, batch: Any, allow: Iterable[str]) -> Assignment:
    """The formats of every site; makes the student ready to be trained."""
    asked = Scheme.parse(scheme)
    scheme = method.adapt(asked)
    known: Assignment | None = getattr(student, "planish_assignment", None)
    if known is not None:
        if replace(known.scheme, heads=scheme.heads) != scheme:  # which no notation says: the model's own
            way = "quantize it with that scheme, or start" if scheme == asked else "start"
            raise PlanishError(
                f"the model is quantized already, by {known.scheme.describe()}; {method.name} would train it by "
                f"{scheme.describe()}: {way} from the network in float"
            )
        if apart := method.restructure(_in_float(student)):
            raise PlanishError(
                f"{apart[0]}: {method.name} trains one weight in place of query and key, and the start has quantized "
                "the two: start from the network in float, or set query_key to False"
            )
        student.requires_grad_(True)
        return known
    method.restructure(student)
    return assign(watch(student, first_image(batch)), scheme, allow=allow)


def _in_float(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    detach(twin)
    twin.__dict__.pop("planish_assignment", None)
    return twin
