"""Trackers hear the events of the log; one that is absent is refused, one that fails is dropped."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from planish.errors import PlanishError
from planish.recipes import tracking
from planish.recipes.tracking import KINDS, Tracking, check_trackers, scalars

STEP = {"event": "step", "arm": "flat", "step": 20, "loss": 0.5, "lr": 0.1, "weight_noise": 0.02}
RESULT = {"event": "result", "arm": "flat", "scheme": "w4a4", "method": "rtn", "seed": 0, "top1": 0.75, "nll": math.nan}
SETTINGS = {"model": "vit", "epochs": 2, "lr": None, "arms": ("given", "flat"), "data": Path("a/b")}


def needs(name):
    absent = [module for module in KINDS[name].modules if tracking.importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{name} is not installed")


def test_the_names_of_numbers():
    assert scalars(STEP) == ({"flat/loss": 0.5, "flat/lr": 0.1, "flat/weight_noise": 0.02}, 20)
    assert scalars(RESULT) == ({"flat/w4a4/rtn/top1": 0.75}, None)  # NaN is no point on a chart
    assert scalars({**RESULT, "scheme": "fp32", "method": "none"}) == ({"flat/fp32/top1": 0.75}, None)
    assert scalars({"event": "epoch", "epoch": 2, "loss": 0.25, "seconds": 1.5}) == (
        {"epoch/epoch": 2.0, "epoch/loss": 0.25, "epoch/seconds": 1.5}, 2,
    )  # fmt: skip
    event = {
        "event": "pass",
        "arm": "given",
        "scheme": "w4a4",
        "method": "rtn",
        "pass": "round",
        "after": {"mse": 1e-3},
    }
    assert scalars(event) == ({"given/w4a4/rtn/round/after_mse": 1e-3}, None)
    assert scalars({"event": "note", "text": "a", "flag": True}) == ({}, None)


def test_what_is_not_known_or_not_installed(monkeypatch):
    check_trackers(())
    with pytest.raises(PlanishError, match="track 'excel' is not known: choose from tensorboard, wandb, mlflow"):
        check_trackers(("excel",))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(PlanishError, match=r"track wandb needs wandb: pip install 'planish\[track\]'"):
        check_trackers(("wandb",))


class Fake:
    def __init__(self, fails=()):
        self.heard, self.fails = [], fails

    def log(self, values, step=None):
        if "log" in self.fails:
            raise ConnectionError("the server\nis away")
        self.heard.append((values, step))

    def finish(self):
        if "finish" in self.fails:
            raise TimeoutError("too late")
        self.heard.append("finished")


def test_one_that_fails_is_dropped_and_the_others_go_on(tmp_path):
    notes, good, bad, late = [], Fake(), Fake(("log",)), Fake(("finish",))
    with Tracking((), tmp_path, "run", SETTINGS, notes.append) as mine:
        mine.trackers = {"tensorboard": good, "mlflow": bad, "wandb": late}
        mine(STEP)
        mine(RESULT)
        assert list(mine.trackers) == ["tensorboard", "wandb"]
    assert good.heard == [scalars(STEP), scalars(RESULT), "finished"]
    values = scalars(STEP)[0]
    assert late.heard == [({**values, "step": 20}, None), scalars(RESULT)]  # it counts its own steps
    assert notes == [
        "note: tracking by mlflow has failed and stops (ConnectionError: the server is away); the run goes on",
        "note: tracking by wandb has failed and stops (TimeoutError: too late); the run goes on",
    ]


def test_nothing_is_imported_or_made_without_being_asked(tmp_path):
    with Tracking((), tmp_path / "t", "run", SETTINGS, print) as mine:
        mine(STEP)
    assert list(tmp_path.iterdir()) == []


@needs("tensorboard")
def test_tensorboard_is_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for event in (STEP, {**STEP, "step": 40, "loss": 0.25}):  # the second after an interruption
        with Tracking(("tensorboard",), tmp_path, "run", SETTINGS, pytest.fail) as mine:
            mine(event)
            mine(RESULT)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload()
    points = {(e.step, e.value) for e in events.Scalars("flat/loss")}
    assert points <= {(20, 0.5), (40, 0.25)}
    assert (40, 0.25) in points
    assert events.Scalars("flat/w4a4/rtn/top1")[0].value == 0.75
    (hparams, *_) = (tmp_path / "tensorboard" / "run").glob("*/hparams.yml")
    text = hparams.read_text()
    assert "epochs: 2" in text
    assert "model: vit" in text


@needs("tensorboard")
def test_one_that_does_not_start_is_refused(tmp_path):
    (tmp_path / "t").write_text("no folder")
    with pytest.raises(PlanishError, match=r"track tensorboard does not start .*: mend it, or leave it out"):
        Tracking(("tensorboard",), tmp_path / "t", "run", SETTINGS, print)


OTHERS = """
import json, os, sys
from pathlib import Path
from planish.recipes.tracking import Tracking
kind, folder = sys.argv[1], Path(sys.argv[2])
events = json.loads(sys.argv[3])
with Tracking((kind,), folder, "run", {"model": "vit", "epochs": 2}, sys.exit) as mine:
    for event in events:
        mine(event)
if kind == "mlflow":
    import mlflow
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    client = mlflow.MlflowClient()
    losses = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "flat/loss")}
    print(json.dumps([sorted(losses), run.data.params, run.data.metrics.get("flat/w4a4/rtn/top1")]))
"""


def elsewhere(kind, folder, events):
    """In a process of its own without a way out: these packages keep threads and settings of the whole process."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
    no_way = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    source = str(Path(__file__).parents[2] / "src")
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-c", OTHERS, kind, str(folder), json.dumps(events)]
    done = subprocess.run(
        command, env={**clean, **no_way, **path}, capture_output=True, text=True, timeout=200, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs("mlflow")
def test_mlflow_goes_on_with_its_run_in_a_local_file(tmp_path):
    elsewhere("mlflow", tmp_path, [STEP])
    out = elsewhere("mlflow", tmp_path, [{**STEP, "step": 40, "loss": 0.25}, {**RESULT, "nll": 1.0}])
    losses, params, top1 = json.loads(out.splitlines()[-1])
    assert losses == [[20, 0.5], [40, 0.25]]
    assert params == {"model": "vit", "epochs": "2"}
    assert top1 == 0.75
    assert (tmp_path / "mlflow" / "mlflow.db").is_file()


@needs("wandb")
def test_wandb_writes_offline_and_keeps_its_identity(tmp_path):
    for event in (STEP, {**STEP, "step": 40}):
        elsewhere("wandb", tmp_path, [event])
    identity = (tmp_path / "wandb" / "run-id").read_text()
    runs = list((tmp_path / "wandb" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert runs
    assert all(b"flat/loss" in run.read_bytes() for run in runs)
