"""``planish diagnose``."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from planish.cli.ended import saying_what_is_kept
from planish.cli.options import Diagnose, named
from planish.cli.resume import check_trust, fresh_name, trusting
from planish.deploy.checkpoint import read_head
from planish.errors import PlanishError
from planish.models.huggingface import is_huggingface
from planish.recipes.config import DiagnosisConfig, ModelOptions, RunConfig, flat_dict, from_flat_dict
from planish.recipes.diagnosis import check_diagnosis, diagnose
from planish.recipes.processes import count_processes, make_console
from planish.recipes.session import free_cores, say
from planish.report.files import short
from planish.report.folder import RunFolder
from planish.report.summary import ARMS
from planish.report.table import print_table


def execute(command: Diagnose) -> None:
    """Look at a network, at several of the same architecture, or at the arms of a run."""
    if count_processes() > 1:
        raise PlanishError("planish diagnose runs in one process: start it without accelerate launch")
    config = DiagnosisConfig(**{item.name: getattr(command, item.name) for item in fields(DiagnosisConfig)})
    if command.network and Path(command.network).is_dir() and not is_huggingface(command.network):
        _run_folder(command, config)
    else:
        _model(command, config)


def _run_folder(command: Diagnose, config: DiagnosisConfig) -> None:
    """The arms of a finished run, into that run's own report."""
    if command.out or command.resume or command.against:
        raise PlanishError(
            f"{command.network} is the folder of a run, whose arms are looked at and whose report is completed: "
            f"leave --out, --resume and --against away (what was done before is not done again)"
        )
    folder = RunFolder.at(command.network)
    if not folder.finished:
        raise PlanishError(f"{command.network}: this run was interrupted; finish it first with planish run --resume")
    folder.read_results()  # complains where nothing was measured
    try:
        began = from_flat_dict(RunConfig, folder.read_config())
    except KeyError as error:
        raise PlanishError(
            f"{folder.path('config.toml')} lacks the setting {error}: is this a run of planish?"
        ) from None
    check_trust(command.network, began.models.model, config.models.model, command.trust)
    config = check_diagnosis(replace(config, models=began.models, allow=began.quantize.allow))
    arms = [arm for arm in began.arms if folder.path(f"{arm}.safetensors").exists()]
    if not arms:
        raise PlanishError(
            f"{command.network}: the float networks of its arms (ARM.safetensors) are not there any more"
        )
    arms.sort(key=lambda arm: ARMS.index(arm) if arm in ARMS else len(ARMS))
    console = make_console()
    networks: dict[str, Path | None] = {arm: folder.path(f"{arm}.safetensors") for arm in arms}
    again = shlex.join(["planish", "diagnose", command.network, *trusting(config.models.model)])
    kept = f"what was done is kept, the same command goes on: {again}"
    try:
        with saying_what_is_kept(lambda: kept, config.models.batch_size):
            results = diagnose(config, networks, folder, console=console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
    _conclude(results, folder.final, console)


def _model(command: Diagnose, config: DiagnosisConfig) -> None:
    """A model, and files of weights that fit it."""
    config = check_diagnosis(replace(config, models=_named(command, config)))
    out = command.out or fresh_name(f"diagnose-{Path(config.models.model).name}")
    if command.resume and not command.out:
        raise PlanishError("--resume needs the folder of the interrupted diagnosis: give it with --out")
    against = {str(path) for path in command.against}
    for path in command.against:
        if not path.is_file():
            raise PlanishError(f"--against {path}: no such file; give weights of the same network (planish flatten)")
        if (head := read_head(path)) is not None and head.assignment is not None:
            raise PlanishError(f"--against {path}: a quantized model; give weights in float (planish flatten)")
    folder = RunFolder.open(out, command.resume)
    if command.resume and (values := folder.read_config()):
        named, config = config.models.model, from_flat_dict(DiagnosisConfig, values)
        check_trust(out, config.models.model, named, command.trust)
        against = set(values.get("against", ()))
    networks: dict[str, Path | None] = {"given": None}
    for path in map(Path, sorted(against)):
        networks[path.stem if path.stem not in networks else f"{path.parent.name}/{path.stem}"] = path
    console = make_console()
    again = shlex.join(["planish", "diagnose", "--resume", "--out", str(out), *trusting(config.models.model)])

    def kept() -> str:
        there = folder.partial.exists()
        return f"what was done is kept, continue with: {again}" if there else "nothing was done yet"

    try:
        with saying_what_is_kept(kept, config.models.batch_size):
            folder.write_config({**flat_dict(config), "against": sorted(against)})
            results = diagnose(config, networks, folder, console=console)
    except PlanishError:
        if not folder.path("results.json").exists() and not command.resume:
            shutil.rmtree(folder.partial, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept()}") from None
    _conclude(results, folder.finish(), console)


def _named(command: Diagnose, config: DiagnosisConfig) -> ModelOptions:
    """The options of the model, whether it was named with --model or without."""
    models = replace(config.models, threads=config.models.threads or free_cores())  # a resumed one takes as many
    return named(command.network, models)


def _conclude(results: dict[str, Any], place: Path, console: Console) -> None:
    """The findings in a few lines."""
    flatness = results["flatness"]
    console.print()
    print_table(results["rows"], console)
    console.print()
    for name, found in flatness["networks"].items():
        split, trace = found["split"], found["curvature"]["trace"]
        say(
            console,
            f"{name}: {flatness['scheme']} adds {split['both']:.3g} nats to a loss of {split['loss']:.3g} (weights "
            f"{split['weights']:.3g}, activations {split['activations']:.3g}); Hessian trace {trace['value']:.4g} "
            f"+- {trace['error']:.2g}",
        )
    for one in flatness["advice"]:
        say(console, one["text"])
    say(console, f"report: {short(place / 'report.html')}")
