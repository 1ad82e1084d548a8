"""``planish train``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from planish.cli.ended import saying_what_is_kept
from planish.cli.files import check_beside, check_target
from planish.cli.options import Train, named
from planish.data import make_loader
from planish.deploy.checkpoint import save
from planish.errors import PlanishError
from planish.models import LoadedModel, state_hash
from planish.network import weights_megabytes
from planish.qat import Method, get_method
from planish.qat.options import changed_options, with_options
from planish.qat.oscillation import oscillation_report
from planish.recipes.check import check_run
from planish.recipes.config import RunConfig, flat_dict
from planish.recipes.kept import Kept, log_beside
from planish.recipes.material import prepare, read_unlabelled, tell_replaced
from planish.recipes.processes import is_main, make_console, on_main
from planish.recipes.quantized import QuantizedTraining, check_start, read_start, split_epochs
from planish.recipes.session import free_cores, say, stoppable
from planish.recipes.work import Work
from planish.report.environment import environment
from planish.report.files import write_text


def execute(command: Train) -> None:
    """Train, measure float, rounded and trained, and write the quantized model with its protocol."""
    command, config, method = _checked(command)
    flat_epochs = split_epochs(command.start, command.flat_epochs, command.train.epochs)
    console, kept = make_console(), Kept(command.out)
    card = _check_targets(command, bool(kept.before()))
    threads = command.models.threads or int(kept.before().get("threads", 0)) or free_cores()
    command = replace(command, models=replace(command.models, threads=threads))
    torch.set_num_threads(threads)
    with stoppable() as stop:
        material = prepare(config, console)
        start = read_start(command.start, material.loaded)
        unlabelled, found = _unlabelled(command, material.loaded, console)
        found |= {} if start is None else {"start_checkpoint": state_hash(start)}
        now = {**flat_dict(command), **material.fingerprint(), **found}
        kept.begin({key: value for key, value in now.items() if key != "network"})
        going_on = on_main(kept.holds_state)
        training = QuantizedTraining(
            material, command.scheme, method, command.train, command.train.epochs - flat_epochs, flat_epochs,
            command.models.seed, command.quantize.allow, start, unlabelled, kept, stop,
            command.record.checkpoint_minutes,
        )  # fmt: skip
        if not going_on:
            with kept.interruptible():  # what the first steps refuse leaves nothing behind
                training.estimate(console)
        began = time.perf_counter()
        with (
            saying_what_is_kept(kept.describe, command.models.batch_size), kept.interruptible(),
            kept.tracked(command.record.track, now, console) as training.log,
            Work(_stages(training), console) as work,
        ):  # fmt: skip
            if flat_epochs:
                if not going_on:
                    training.rehearse()
                work.begin(f"flattening {material.loaded.name} for {command.scheme}")
                training.flatten(work.at)
                work.end()
            verb = "going on with" if on_main(kept.state.exists) else "training"
            work.begin(f"{verb} {material.loaded.name} at {command.scheme} by {method.name}")
            trained = training.train(work.at)
            work.end()
            seconds = time.perf_counter() - began
            work.begin("measuring")
            rows = training.measure(trained)
            for row in rows:
                training.log({"event": "result", "arm": row["name"], **row})
            work.end()
            lost = tell_replaced(material, console)
            protocol = {**_protocol(command, method, training), **found, **lost, "rows": rows}
            if not going_on:  # else nobody has measured how long it took in all
                protocol["seconds"] = round(seconds, 1)
            oscillation = _oscillation(training, trained)
            kept.finish_log()
            if is_main():  # the model comes last: where it is, everything is
                whole = {"protocol": protocol, "environment": environment(), "oscillation": oscillation}
                write_text(card, json.dumps(whole, indent=2, default=str))
                save(trained, command.out, protocol=protocol, classes=material.classes)
    kept.drop()
    _show(console, rows, oscillation)
    options = ", ".join(f"{name}={value}" for name, value in changed_options(method).items())
    by, size = f"{method.name} ({options})" if options else method.name, weights_megabytes(trained)
    say(console, f"{command.out}: {command.scheme} by {by}; {size:.3f} MB of weights at their bits")


def _show(console: Console, rows: list[dict[str, Any]], oscillation: dict[str, Any]) -> None:
    for row in rows:
        flips = f", {100 * row['flip_rate']:.2f} % flips" if "flip_rate" in row else ""
        say(console, f"{row['name']}: top-1 {100 * row['top1']:.2f} %{flips}")
    if oscillation:
        shares = 100 * oscillation["after"]["oscillating"], 100 * oscillation["after"]["near"]
        say(console, "{:.1f} % of the weights oscillate, {:.1f} % lie near a threshold".format(*shares))


def _checked(command: Train) -> tuple[Train, RunConfig, Method]:
    """The command with its network and its scheme spelled as planish spells them, and the method with its options."""
    command = replace(command, models=named(command.network, command.models))
    config = check_run(
        RunConfig(
            arms=("tuned",), schemes=(command.scheme,), models=command.models, train=command.train,
            quantize=command.quantize, record=command.record,
        )
    )  # fmt: skip
    method = with_options(get_method(command.method), (text for texts in command.option for text in texts))
    if command.unlabelled and not method.takes_unlabelled:
        raise PlanishError(f"{method.name} takes no images without labels: leave --unlabelled out, or give --method cr")
    check_start(command.start)
    return replace(command, scheme=config.schemes[0], record=config.record), config, method


def _check_targets(command: Train, going_on: bool) -> Path:
    """Where the protocol goes; raises :class:`PlanishError` if it or the model cannot be written."""
    check_target(command.out, command.overwrite)
    card = command.out.with_suffix(".json")
    check_beside(command.out, card, "the protocol", command.overwrite, going_on)
    check_beside(command.out, log_beside(command.out), "the log", command.overwrite, going_on)
    return card


def _unlabelled(command: Train, loaded: LoadedModel, console: Console) -> tuple[Any, dict[str, Any]]:
    """A loader of the images without labels, and what a continued training must find again of them."""
    if command.unlabelled is None:
        return None, {}
    options = command.models
    images, found = read_unlabelled(command.unlabelled, loaded, options.seed, console)
    loader = make_loader(
        images, min(options.batch_size, len(images)), shuffle=True, seed=options.seed, workers=options.workers,
        drop_last=True, augment=True,
    )  # fmt: skip
    return loader, found


def _stages(training: QuantizedTraining) -> list[tuple[str, float]]:
    flat = [("flatten", 1.1 * training.flat_epochs)] if training.flat_epochs else []
    return [*flat, ("train", 2.0 * training.epochs), ("measure", 0.3)]


def _oscillation(training: QuantizedTraining, trained: torch.nn.Module) -> dict[str, Any]:
    """Where the weights lie and how many oscillate, at the end and before annealing; empty without low-bit weights."""
    tracker = training.tracker
    if not tracker.frequency:
        return {}
    reports = {"after": oscillation_report(trained, tracker)}
    return {"before_annealing": tracker.earlier, **reports} if tracker.report_at is not None else reports


def _protocol(command: Train, method: Method, training: QuantizedTraining) -> dict[str, Any]:
    """All that the numbers depend on, beside the environment."""
    material, settings = training.material, training.settings
    return {
        "model": material.loaded.name, "checkpoint": material.loaded.weights_hash, "data": material.data.name,
        "scheme": command.scheme, "method": method.name, "options": asdict(method), "start": command.start,
        "flat_epochs": training.flat_epochs, "epochs": command.train.epochs, "train": asdict(command.train),
        "averaging": settings.averaging, "seed": command.models.seed, "batch_size": command.models.batch_size,
        "train_images": len(material.data.train_labels), "test_images": material.test_images,
        "calibration_images": material.calibration_images, "unlabelled": str(command.unlabelled or ""),
        "allow": list(command.quantize.allow),
    }  # fmt: skip
