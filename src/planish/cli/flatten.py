"""``planish flatten``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from planish.cli.files import check_target
from planish.cli.options import Flatten
from planish.errors import PlanishError
from planish.models import save_weights
from planish.recipes.arms import arm_settings
from planish.recipes.check import check_models, check_training
from planish.recipes.config import RunConfig, flat_dict
from planish.recipes.material import prepare
from planish.recipes.session import free_cores, say, stoppable
from planish.recipes.trained import train_arm
from planish.recipes.work import Work
from planish.report.files import write_text, writing
from planish.scheme import Scheme

_SETTINGS = "settings.json"


def execute(command: Flatten) -> None:
    """Train, and write the float weights; an interrupted training goes on when the command is given again."""
    Scheme.parse(command.scheme)
    check_models(command.models)
    check_training(command.train, command.noise)
    check_target(command.out, command.overwrite)
    console = Console()
    kept = command.out.with_name(command.out.name + ".checkpoint")
    before = _read(kept)
    threads = command.models.threads or int(before.get("threads", 0)) or free_cores()
    command = replace(command, models=replace(command.models, threads=threads))
    torch.set_num_threads(threads)
    settings = arm_settings("flat", command.train, command.noise, command.models.seed)
    assert settings is not None
    with stoppable() as stop:
        config = RunConfig(models=command.models, train=command.train)
        material = prepare(config, console, calibrate=False)
        now = json.loads(json.dumps({**flat_dict(command), **material.fingerprint()}))
        now = {key: value for key, value in now.items() if key not in ("out", "overwrite")}
        _compare(before, now, kept)
        with writing(kept):
            kept.mkdir(exist_ok=True)
        write_text(kept / _SETTINGS, json.dumps(now, indent=2))
        state, last_good = kept / "state", command.out.with_name(f"{command.out.stem}-last-good{command.out.suffix}")
        going_on = state.exists()
        try:
            with Work([("train", 1.0)], console) as work:
                work.begin(
                    f"{'going on with' if going_on else 'flattening'} {material.loaded.name} for {command.scheme}"
                )
                flat = train_arm(
                    material, (command.scheme,), settings, allow=command.allow, checkpoint=state, resume=True,
                    stop=stop, progress=work.at, last_good=last_good,
                )  # fmt: skip
                work.end()
        except KeyboardInterrupt:
            if not state.exists():
                shutil.rmtree(kept, ignore_errors=True)
                raise KeyboardInterrupt("interrupted before the first epoch was done; nothing is kept") from None
            raise KeyboardInterrupt(
                f"interrupted; the state is kept in {kept}, the same command continues it"
            ) from None
        save_weights(flat, command.out, {"format": "pt"})
    shutil.rmtree(kept, ignore_errors=True)
    say(
        console,
        f"{command.out}: {command.train.epochs} epochs in {work.elapsed:.0f} s; use it with --weights {command.out}",
    )


def _read(kept: Path) -> dict[str, Any]:
    """The settings of an interrupted training; empty if there is none."""
    if not kept.exists():
        return {}
    try:
        values = json.loads((kept / _SETTINGS).read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        if not (kept / "state").exists():
            return {}
        raise PlanishError(
            f"{kept} holds a checkpoint but not its settings: delete it, or choose another --out"
        ) from None


def _compare(before: dict[str, Any], now: dict[str, Any], kept: Path) -> None:
    if not before:
        return
    differing = [key for key in (now | before) if now.get(key) != before.get(key)]
    if differing:
        shown = "; ".join(f"{key} was {before.get(key, 'unset')}, is {now.get(key, 'unset')}" for key in differing[:3])
        raise PlanishError(
            f"{kept} holds an interrupted training with other settings ({shown}): give the same ones to continue it, "
            f"delete it to start over, or choose another --out"
        )
