"""``planish train``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from planish.cli.files import check_target
from planish.cli.options import Train
from planish.data import load_unlabelled, make_loader, set_epoch
from planish.errors import PlanishError
from planish.evaluation import evaluate
from planish.flattening import flatten
from planish.models import read_weights, save_weights
from planish.ptq import quantize
from planish.ptq.files import load_quantized, save_quantized, weights_megabytes
from planish.qat import Method, QATSettings, get_method, train_quantized
from planish.qat.options import changed_options, with_options
from planish.qat.oscillation import OscillationTracker, oscillation_report
from planish.recipes.arms import arm_settings
from planish.recipes.check import check_run
from planish.recipes.config import NoiseOptions, RunConfig, flat_dict
from planish.recipes.kept import Kept
from planish.recipes.material import Material, prepare
from planish.recipes.session import StopFlag, free_cores, say, stoppable
from planish.recipes.trained import keeping
from planish.recipes.work import Work
from planish.report.environment import environment
from planish.report.files import write_text
from planish.training import TrainingSettings

STARTS = ("given", "flat")


def execute(command: Train) -> None:
    """Train, measure float, rounded and trained, and write the quantized model."""
    if command.network:
        command = replace(command, models=replace(command.models, model=command.network))
    config = check_run(
        RunConfig(
            arms=("tuned",), schemes=(command.scheme,), models=command.models, train=command.train,
            quantize=command.quantize,
        )
    )  # fmt: skip
    command = replace(command, scheme=config.schemes[0])
    method = with_options(get_method(command.method), command.option)
    flat_epochs = _flat_epochs(command)
    check_target(command.out, command.overwrite)
    console, kept = Console(), Kept(command.out)
    threads = command.models.threads or int(kept.before().get("threads", 0)) or free_cores()
    command = replace(command, models=replace(command.models, threads=threads))
    torch.set_num_threads(threads)
    with stoppable() as stop:
        start = None if command.start in STARTS else _quantized(command)
        material = prepare(config, console)
        unlabelled = _unlabelled(command, material, console)
        now = {**flat_dict(command), **material.fingerprint()}
        kept.begin({key: value for key, value in now.items() if key not in ("out", "overwrite", "network")})
        began = time.perf_counter()
        with kept.interruptible(), Work(_stages(command, flat_epochs), console) as work:
            if flat_epochs:
                start = _flattened(command, material, kept, flat_epochs, stop, work)
            work.begin(f"training {material.loaded.name} at {command.scheme} by {method.name}")
            tracker = OscillationTracker(report_at=method.averaging_until)
            trained = _train(command, method, material, start, unlabelled, kept, flat_epochs, stop, work, tracker)
            work.end()
            seconds = time.perf_counter() - began
            work.begin("measuring")
            rows = _measure(command, material, trained)
            work.end()
        protocol = {**_protocol(command, method, material, flat_epochs), "seconds": round(seconds, 1), "rows": rows}
        save_quantized(trained, command.out, material.loaded.recipe, material.loaded.preprocessing, protocol)
        oscillation = _oscillation(trained, tracker)
        card = {"protocol": protocol, "environment": environment(), "oscillation": oscillation}
        write_text(command.out.with_suffix(".json"), json.dumps(card, indent=2, default=str))
    kept.drop()
    for row in rows:
        flips = f", {100 * row['flip_rate']:.2f} % flips" if "flip_rate" in row else ""
        say(console, f"{row['name']}: top-1 {100 * row['top1']:.2f} %{flips}")
    if oscillation:
        shares = 100 * oscillation["after"]["oscillating"], 100 * oscillation["after"]["near"]
        say(console, "{:.1f} % of the weights oscillate, {:.1f} % lie near a threshold".format(*shares))
    size = weights_megabytes(trained)
    say(console, f"{command.out}: {command.scheme} by {method.name}; {size:.3f} MB of weights at their bits")


def _flat_epochs(command: Train) -> int:
    """The epochs that go into flattening, of those in all."""
    epochs, flat = command.train.epochs, command.flat_epochs
    if command.start != "flat":
        if flat is not None:
            raise PlanishError("flat-epochs is for --start flat: leave it out, or give --start flat")
        return 0
    flat = epochs // 2 if flat is None else flat
    if not 0 < flat < epochs:
        raise PlanishError(
            f"flat-epochs is {flat} of {epochs} epochs in all: flattening and training need at least 1 each"
        )
    return flat


def _quantized(command: Train) -> nn.Module:
    path = Path(command.start)
    if not path.is_file():
        raise PlanishError(
            f"start is {command.start!r}: give {' or '.join(STARTS)}, or a file that planish quantize wrote"
        )
    loaded = load_quantized(path, trust=True)
    if loaded is None:
        keys = len(read_weights(path)[0])
        raise PlanishError(f"{path} holds plain weights ({keys} tensors), no quantized model: give it as --weights")
    return loaded[0]


def _unlabelled(command: Train, material: Material, console: Console) -> Any:
    if command.unlabelled is None:
        return None
    options = command.models
    images, notes = load_unlabelled(command.unlabelled, material.loaded.preprocessing, seed=options.seed)
    for note in notes:
        say(console, f"note: {note}")
    return make_loader(
        images, min(options.batch_size, len(images)), shuffle=True, seed=options.seed, workers=options.workers,
        drop_last=True, augment=True,
    )  # fmt: skip


def _stages(command: Train, flat_epochs: int) -> list[tuple[str, float]]:
    train = ("train", 2.0 * (command.train.epochs - flat_epochs))
    return [*([("flatten", 1.1 * flat_epochs)] if flat_epochs else []), train, ("measure", 0.3)]


def _flattened(
    command: Train, material: Material, kept: Kept, epochs: int, stop: StopFlag, work: Work
) -> nn.Module:  # fmt: skip
    """The flat start: trained, or read back if an interrupted command had come that far."""
    done = kept.folder / "flat.safetensors"
    work.begin(f"flattening {material.loaded.name} for {command.scheme}")
    settings = arm_settings("flat", replace(command.train, epochs=epochs), NoiseOptions(), command.models.seed)
    assert settings is not None
    if done.exists():
        settings = replace(settings, training=replace(settings.training, epochs=0))
    with stop.gently(), keeping(kept.last_good, kept.folder):
        flat = flatten(
            material.loaded.model, material.train, command.scheme, settings=settings, allow=command.quantize.allow,
            checkpoint_dir=kept.folder / "flat", resume=not done.exists(), should_stop=stop,
            progress=lambda step, steps, loss: work.at(step / steps),
        )  # fmt: skip
    if done.exists():
        flat.load_state_dict(read_weights(done)[0])
    else:
        save_weights(flat, done, {"format": "pt"})
    work.end()
    return flat


def _train(
    command: Train, method: Method, material: Material, start: nn.Module | None, unlabelled: Any, kept: Kept,
    flat_epochs: int, stop: StopFlag, work: Work, tracker: OscillationTracker,
) -> nn.Module:  # fmt: skip
    options = command.train
    training = TrainingSettings(
        epochs=options.epochs - flat_epochs, lr=options.lr, optimizer=options.optimizer, freeze_batchnorm=False,
        mixed_precision=options.mixed_precision, seed=command.models.seed,
    )  # fmt: skip
    given = material.loaded.model
    set_epoch(material.train, 0)
    with stop.gently(), keeping(kept.last_good, kept.state):
        return train_quantized(
            given if start is None else start.to(material.device), material.train, command.scheme, method, given=given,
            calibration=material.calibration, unlabelled=unlabelled, settings=QATSettings(training=training),
            allow=command.quantize.allow, extra=[tracker], checkpoint_dir=kept.state, resume=True, should_stop=stop,
            progress=lambda step, steps, loss: work.at(step / steps),
        )  # fmt: skip


def _measure(command: Train, material: Material, trained: nn.Module) -> list[dict[str, Any]]:
    given = material.loaded.model
    rounded = quantize(given, material.calibration, command.scheme, allow=command.quantize.allow)
    worth = {"float": evaluate(given, material.test)}
    for name, model in ((f"{command.scheme} by rtn", rounded), (f"{command.scheme} trained", trained)):
        worth[name] = evaluate(model, material.test, reference=given)
    return [{"name": name, **values} for name, values in worth.items()]


def _oscillation(trained: nn.Module, tracker: OscillationTracker) -> dict[str, Any]:
    """Where the weights lie and how many oscillate, at the end and before annealing; empty without low-bit weights."""
    if not tracker.frequency:
        return {}
    reports = {"after": oscillation_report(trained, tracker)}
    return {"before_annealing": tracker.earlier, **reports} if tracker.report_at != 1.0 else reports


def _protocol(command: Train, method: Method, material: Material, flat_epochs: int) -> dict[str, Any]:
    return {
        "model": material.loaded.name, "checkpoint": material.loaded.weights_hash, "data": material.data.name,
        "scheme": command.scheme, "method": method.name, "options": changed_options(method), "start": command.start,
        "flat_epochs": flat_epochs, "epochs": command.train.epochs, "train": asdict(command.train),
        "averaging": QATSettings.averaging, "seed": command.models.seed, "batch_size": command.models.batch_size,
        "train_images": len(material.data.train_labels), "test_images": material.test_images,
        "calibration_images": material.calibration_images, "unlabelled": str(command.unlabelled or ""),
        "allow": list(command.quantize.allow),
    }  # fmt: skip
