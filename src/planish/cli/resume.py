"""What ``--resume`` continues: the folder of an interrupted run, and the settings that it began with."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

from planish.cli.options import Run
from planish.errors import PlanishError
from planish.recipes.config import RunConfig, from_flat_dict
from planish.report.folder import RunFolder

RUNS = Path("runs")


def as_it_began(command: Run) -> Run:
    """The command with the settings in the run's config.toml, on which options given now are laid."""
    out = command.out or newest_interrupted()
    values = RunFolder.open(out, resume=True, active=False).read_config()  # the run itself will check the folder
    if not values:  # killed before it had written any
        return Run(out=out)
    try:
        config = from_flat_dict(RunConfig, values)
    except KeyError as error:
        raise PlanishError(f"{out}: its config.toml lacks the setting {error}, so it cannot be resumed") from None
    return Run(**{item.name: getattr(config, item.name) for item in fields(RunConfig)}, out=out)


def newest_interrupted() -> Path:
    """The name of the run that was interrupted last; raises PlanishError if there is none."""
    found = sorted(RUNS.glob(".*.partial"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise PlanishError(f"there is no interrupted run in {RUNS}/ to resume; give its folder with --out")
    return found[-1].with_name(found[-1].name[1 : -len(".partial")])


def fresh_name(model: str) -> Path:
    """``runs/MODEL-DATE-TIME``, which is not there yet."""
    stem = Path(model.rpartition(":")[0]).stem if ".py:" in model else model.rpartition("/")[2]
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in stem) + time.strftime("-%Y%m%d-%H%M%S")
    taken = (RUNS / name).exists() or (RUNS / f".{name}.partial").exists()
    return RUNS / (f"{name}-{time.time_ns() % 1000}" if taken else name)
