"""Several runs as one: rows with distinct arms, seeds averaged where nothing else differs, and what does differ.

Rows of two runs count as seeds of one arm only if all settings that they depend on are equal but for the seeds, and no
seed was measured twice with different results. Otherwise each run's arm has a row of its own, named ``RUN: ARM``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from planish.errors import PlanishError
from planish.report.folder import RunFolder
from planish.report.plain import as_text, flatten_keys, join

OUTCOMES = ("fp_top1", "seconds_training")  # in the protocol card, but measured
SEEDS = ("seed", "calibration_seed")
FLAT = ("flat_prepared_for", "weight_noise", "activation_noise", "noise", "flat_labels", "flat_batch_statistics",
        "distillation", "output_error")  # fmt: skip
TRAINING = ("train_images", "labels_used", "epochs", "optimizer", "learning_rate", "precision", *FLAT)

Key = tuple[str, str, Any]  # of a row of one arm: scheme, method, seed


@dataclass(frozen=True)
class Run:
    """One run: what to call it, the content of its results.json, and whether it came to its end."""

    name: str
    results: Mapping[str, Any]
    complete: bool = True

    @cached_property
    def protocol(self) -> dict[str, str]:
        """Every setting as text, and the version of planish, which is one, too."""
        version = {"planish": (self.results.get("environment") or {}).get("planish")}
        found = flatten_keys({**(self.results.get("protocol") or {}), **version})
        return {key: as_text(value) for key, value in found.items() if not key.startswith(OUTCOMES) and as_text(value)}

    @cached_property
    def environment(self) -> dict[str, str]:
        found = flatten_keys(self.results.get("environment") or {})
        return {key: as_text(value) for key, value in found.items() if key != "planish"}

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(str(row.get("arm", "?")) for row in self.results["rows"]))

    def rows(self, arm: str) -> dict[Key, Mapping[str, Any]]:
        """The rows of an arm; of two for one seed the later one counts."""
        rows = (row for row in self.results["rows"] if str(row.get("arm", "?")) == arm)
        return {(str(row.get("scheme", "?")), str(row.get("method", "?")), row.get("seed")): row for row in rows}


@dataclass(frozen=True)
class Comparison:
    """The runs, their rows under distinct arms, what was done to get there, and the settings that differ."""

    runs: list[Run]
    rows: list[dict[str, Any]]
    notes: list[str]
    differences: dict[str, list[str]]  # setting: its value in each run, empty where it is not set
    caution: str = ""  # belongs to every sentence that compares numbers of several runs

    def as_results(self) -> dict[str, Any]:
        """In the form of results.json, for :func:`planish.report.html.write_report`."""
        first = self.runs[0]
        return {
            "protocol": {key: text for key, text in first.protocol.items() if key not in self.differences},
            "environment": {k: v for k, v in first.environment.items() if _environment(k) not in self.differences},
            "rows": self.rows,
            "flatness": {},
            "comparison": {
                "runs": [run.name for run in self.runs],
                "notes": self.notes,
                "differences": self.differences,
                "caution": self.caution,
            },
        }


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, finished or interrupted.

    Raises:
        PlanishError: fewer than two, one of them twice, a folder that is no run, or a run without any row.
    """
    if len(folders) < 2:
        raise PlanishError(
            f"comparing needs two runs or more, got {len(folders)}: give their folders, such as runs/a runs/b"
        )
    found = [RunFolder.at(_final(folder)) for folder in folders]
    places = [run.final.resolve() for run in found]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise PlanishError(f"{folder}: this run is named twice; a run is compared with others, not with itself")
    names = _names(places)
    runs = [Run(name, run.read_results(), run.finished) for name, run in zip(names, found, strict=True)]
    for folder, run in zip(folders, runs, strict=True):
        if not run.results["rows"]:
            raise PlanishError(f"{folder}: nothing was measured in this run yet, so there is nothing to compare")
        if not all(isinstance(row, dict) for row in run.results["rows"]):
            raise PlanishError(f'{folder}: not a results file of planish; expected objects in the list of "rows"')
    return runs


def compare(runs: Sequence[Run]) -> Comparison:
    """Put the rows of all runs together; see the module's first lines for what is averaged."""
    rows: list[dict[str, Any]] = []
    merged: dict[str, list[str]] = {}  # sentence about some runs: the arms of which it is true
    apart: dict[str, list[str]] = {}
    for arm in dict.fromkeys(arm for run in runs for arm in run.arms):
        groups = _groups([run for run in runs if arm in run.arms], arm)
        for group in groups:
            name = arm if len(groups) == 1 else f"{_together(group)}: {arm}"
            rows += _pooled(group, arm, name)
            if len(group) > 1:
                merged.setdefault(_pooling(group, arm), []).append(arm)
        if len(groups) > 1:
            apart.setdefault(_why_apart(groups, arm), []).append(arm)
    notes = [f"{run.name} is incomplete: it was interrupted after {_count(run)}." for run in runs if not run.complete]
    notes += [f"{join(arms)}: {sentence}" for sentence, arms in [*merged.items(), *apart.items()]]
    differences = _differences(runs)
    decisive = [key for key in differences if key not in SEEDS and not key.startswith("environment.")]
    caution = f"The protocols of the runs differ in {join(decisive)}." if decisive else ""
    return Comparison(list(runs), rows, notes, differences, caution)


def _final(folder: Path) -> Path:
    """The name of a run, also for one that is given by its temporary folder."""
    name = folder.name
    interrupted = name.startswith(".") and name.endswith(".partial")
    return folder.with_name(name[1 : -len(".partial")]) if interrupted else folder


def _names(places: Sequence[Path]) -> list[str]:
    """The names of folders, with as many of their parents as it takes to tell them apart."""
    for depth in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def _groups(runs: Iterable[Run], arm: str) -> list[list[Run]]:
    """Runs whose rows of this arm differ in the seed at most, each with the first group that it fits."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((g for g in groups if not any(_conflicts(run, other, arm) for other in g)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return groups


def _conflicts(a: Run, b: Run, arm: str) -> list[str]:
    """The settings that keep rows of this arm apart; ``["results"]`` if only these do, with equal seeds."""
    ignored = {*SEEDS, *(TRAINING if arm == "given" else () if arm == "flat" else FLAT)}
    keys = [key for key in a.protocol | b.protocol if key.partition(".")[0] not in ignored]
    keys = [key for key in keys if a.protocol.get(key) != b.protocol.get(key)]
    # the description of a scheme that only one of them has says nothing of the other's rows
    keys = [key for key in keys if not key.startswith("scheme_") or (key in a.protocol and key in b.protocol)]
    mine, theirs = a.rows(arm), b.rows(arm)
    differ = any(mine[key].get("top1") != theirs[key].get("top1") for key in mine.keys() & theirs.keys())
    return keys or (["results"] if differ else [])


def _pooled(group: Sequence[Run], arm: str, name: str) -> list[dict[str, Any]]:
    """The rows of a group; one that several runs share is taken once."""
    found: dict[Key, dict[str, Any]] = {}
    for run in group:
        for key, row in run.rows(arm).items():
            found.setdefault(key, {**row, "arm": name, "run": run.name})
    return list(found.values())


def _pooling(group: Sequence[Run], arm: str) -> str:
    names = join([run.name for run in group])
    seeds = list(dict.fromkeys(seed for run in group for _, _, seed in run.rows(arm)))
    if len(seeds) == 1:
        return f"with the same seed in {names}, so taken together; numbers that they share are equal."
    return f"the seeds {join(sorted(map(str, seeds), key=lambda seed: (len(seed), seed)))} of {names} are averaged."


def _why_apart(groups: Sequence[Sequence[Run]], arm: str) -> str:
    names = join([_together(group) for group in groups])
    keys = dict.fromkeys(
        k for i, g in enumerate(groups) for other in groups[:i] for k in _conflicts(g[0], other[0], arm)
    )
    if list(keys) == ["results"]:
        return f"{names} have different results for one seed, so each has a row of its own."
    return f"{names} differ in {join([key for key in keys if key != 'results'])}, so each has a row of its own."


def _differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings and parts of the environment that are not the same in all runs."""
    settings = [{**r.protocol, **{_environment(k): v for k, v in r.environment.items()}} for r in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    found = {key: [values.get(key, "") for values in settings] for key in keys}
    return {key: texts for key, texts in found.items() if len(set(texts)) > 1}


def _environment(key: str) -> str:
    return f"environment.{key}"


def _together(group: Sequence[Run]) -> str:
    """``a``, ``a+b`` where that is short, or ``a+2 more``."""
    both = "+".join(run.name for run in group)
    return (
        both if len(group) == 1 or (len(group) == 2 and len(both) <= 20) else f"{group[0].name}+{len(group) - 1} more"
    )


def _count(run: Run) -> str:
    rows = len(run.results["rows"])
    return f"{rows} {'row' if rows == 1 else 'rows'}"
