"""What ``--resume`` continues: the folder of an interrupted run, and the settings that it began with."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

from planish.cli.options import Run
from planish.errors import PlanishError
from planish.models.foreign import split_file_name
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
    check_trust(out, config.models.model, command.models.model, command.trust)
    return Run(**{item.name: getattr(config, item.name) for item in fields(RunConfig)}, out=out)


def check_trust(folder: Path | str, found: str, named: str, trust: bool) -> None:
    """Raise PlanishError for the settings of a folder that name a Python file, which nobody has asked to run.

    Args:
        found: the model that the settings name.
        named: the model that the command names; a name that a user types is a request.
    """
    if split_file_name(found) is not None and found != named and not trust:
        raise PlanishError(
            f"{folder} names the model {found}, whose Python code would be run: "
            f"allow it with trust=True if you trust that file"
        )


def trusting(model: str) -> list[str]:
    """What has to be added to a command that goes on with a run of this model."""
    return ["--trust"] if split_file_name(model) is not None else []


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
