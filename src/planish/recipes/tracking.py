"""Trackers: TensorBoard, Weights & Biases and MLflow through Accelerate, fed with the events of the log.

Nothing leaves this machine unless the variables of the tracker itself say so: W&B writes an offline run, MLflow a local
file. The log (JSON lines) is written in any case; a tracker that fails is dropped, and the work goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from planish.errors import PlanishError
from planish.recipes.processes import on_main

PROJECT = "planish"


@dataclass(frozen=True)
class _Kind:
    modules: tuple[str, ...]  # all of which it needs
    environment: Callable[[Path], dict[str, str]]  # what keeps it on this machine, where nothing else is said
    options: Callable[[Path, str], dict[str, Any]]  # for Accelerate's tracker, from its folder and the run's name
    begun: Callable[[Path, Any], None] = lambda folder, run: None  # with what Accelerate calls the tracker's own run
    own_steps: bool = False  # it takes no step that is smaller than one before, and the steps of every arm begin anew


def _mlflow_environment(folder: Path) -> dict[str, str]:
    if "MLFLOW_TRACKING_URI" in os.environ:  # the user has a server, or one database for all runs
        return {}
    where = f"sqlite:///{folder / 'mlflow.db'}"
    return {"MLFLOW_TRACKING_URI": where, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}


KINDS = {
    "tensorboard": _Kind(("tensorboard",), lambda folder: {}, lambda folder, name: {}),
    "wandb": _Kind(
        ("wandb",),
        # with these, nothing is sent and nobody is asked for a key; `wandb sync` sends it later
        lambda folder: {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"},
        lambda folder, name: {"dir": str(folder), "name": name, "id": _identity(folder), "resume": "allow"},
        lambda folder, run: run.define_metric("*", step_metric="step"),
        own_steps=True,
    ),
    "mlflow": _Kind(
        ("mlflow", "sqlalchemy", "alembic"),
        _mlflow_environment,
        lambda folder, name: {"run_name": name, "logging_dir": str(folder / "artifacts"), **_mlflow_run(folder)},
        lambda folder, run: _keep(folder, run.info.run_id),
    ),
}


def check_trackers(names: Collection[str]) -> None:
    """Raise :class:`PlanishError` for a tracker that is not known or not installed."""
    for name in names:
        if name not in KINDS:
            raise PlanishError(f"track {name!r} is not known: choose from {', '.join(KINDS)}")
        absent = [module for module in KINDS[name].modules if importlib.util.find_spec(module) is None]
        if absent:
            raise PlanishError(f"track {name} needs {', '.join(absent)}: pip install 'planish[track]'")


class Tracking:
    """Receives the events of a run, and passes their numbers on to trackers; use it as a context manager.

    Args:
        names: of trackers, checked; none is fine.
        folder: for what the trackers write; made if there is a tracker.
        name: of the run.
        settings: the hyperparameters.
        note: receives a sentence when a tracker fails.

    Raises:
        PlanishError: a tracker does not start.
    """

    def __init__(
        self, names: Collection[str], folder: Path, name: str, settings: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        self.note = note
        self.trackers: dict[str, Any] = {}
        if names:
            on_main(lambda: self._start(names, folder, name, settings))

    def _start(self, names: Collection[str], folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        for kind in names:
            place = Path(os.path.abspath(folder)) / kind
            try:
                place.mkdir(parents=True, exist_ok=True)
                for variable, value in KINDS[kind].environment(place).items():
                    os.environ.setdefault(variable, value)
                accelerator = Accelerator(log_with=kind, project_dir=str(place))
                options = KINDS[kind].options(place, name)
                project = name if kind == "tensorboard" else PROJECT  # a folder of its own, or a project on the server
                accelerator.init_trackers(project, _plain(settings), {kind: options})
                tracker: Any = accelerator.get_tracker(kind)
                KINDS[kind].begun(place, tracker.tracker)
            except Exception as error:  # of a foreign package, whatever it is
                raise PlanishError(
                    f"track {kind} does not start ({_short(error)}): mend it, or leave it out"
                ) from error
            self.trackers[kind] = tracker

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.trackers):
            self._try(name, lambda tracker: tracker.finish())
        self.trackers = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Pass on the numbers of an event, under names such as ``flat/loss`` and ``flat/w4a4/rtn/top1``."""
        if self.trackers:
            values, step = scalars(event)
            with_step = values if step is None else {**values, "step": step}
            for name in list(self.trackers) if values else ():
                told = (with_step, None) if KINDS[name].own_steps else (values, step)
                self._try(name, lambda tracker, told=told: tracker.log(told[0], step=told[1]))  # type: ignore[misc]

    def _try(self, name: str, call: Callable[[Any], None]) -> None:
        try:
            call(self.trackers[name])
        except Exception as error:  # of a foreign package; the work is worth more
            del self.trackers[name]
            self.note(f"note: tracking by {name} has failed and stops ({_short(error)}); the run goes on")


_OWN = ("event", "step", "seed", "place")  # no numbers to follow
_GROUP = ("arm", "scheme", "method")


def scalars(event: Mapping[str, Any]) -> tuple[dict[str, float], int | None]:
    """The finite numbers of an event by name, and the training step they belong to (``None``: after the training).

    >>> scalars({"event": "step", "arm": "flat", "step": 20, "loss": 0.5})
    ({'flat/loss': 0.5}, 20)
    """
    group = "/".join(str(event[key]) for key in _GROUP if key in event and event[key] != "none")
    kind = str(event.get("event"))
    if kind == "epoch":
        group = f"{group}/epoch" if group else "epoch"
    elif "pass" in event:
        group = "/".join(part for part in (group, str(event["pass"]), str(event.get("unit", ""))) if part)
    found: dict[str, float] = {}
    for name, value in _numbers({k: v for k, v in event.items() if k not in (*_OWN, *_GROUP)}):
        found[f"{group}/{name}" if group else name] = value
    step = event.get("epoch") if kind == "epoch" else event.get("step")
    return found, step


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}_")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found.append((f"{prefix}{name}", float(value)))
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters as all trackers take them."""
    kept = {name: value for name, value in settings.items() if value is not None}
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in kept.items()}


_RUN = "run-id"


def _mlflow_run(folder: Path) -> dict[str, Any]:
    """The run that an interrupted command began, to go on with."""
    file = folder / _RUN
    return {"run_id": file.read_text().strip()} if file.exists() else {}


def _identity(folder: Path) -> str:
    """A name for the run that stays when it is continued, and that no other run has."""
    file = folder / _RUN
    if not file.exists():
        _keep(folder, os.urandom(8).hex())
    return file.read_text().strip()


def _keep(folder: Path, run: str) -> None:
    (folder / _RUN).write_text(run)


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
