"""``--track`` of run, flatten and train."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from planish.recipes import tracking

RUN = ["--arms", "given,flat", "--methods", "rtn", "--schemes", "w4a4", "--epochs", "2", "--out", "run"]
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def test_what_is_absent_is_refused_before_anything_is_made(tiny, planish, monkeypatch, tmp_path):
    for command in ("run", "flatten", "train"):
        ended = planish(command, *tiny, "--track", "excel")
        assert ended.status == 2
        assert "track 'excel' is not known: choose from tensorboard, wandb, mlflow" in ended.err
    with monkeypatch.context() as patch:
        patch.setattr(tracking.importlib.util, "find_spec", lambda module: None)
        ended = planish("run", *tiny, "--track", "mlflow")
        assert "pip install 'planish[track]'" in ended.err
    assert "checkpoint-minutes is -1.0" in planish("flatten", *tiny, "--checkpoint-minutes", "-1").err
    assert list(tmp_path.iterdir()) == []


@needs_tensorboard
def test_tensorboard_hears_a_run(tiny, planish, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert planish("run", *tiny, *RUN, "--track", "tensorboard").status == 0
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "tensorboard" / "run")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"flat/loss", "flat/lr", "flat/weight_noise", "flat/epoch/loss", "flat/w4a4/rtn/top1"} <= names
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    (top1,) = [row["top1"] for row in rows if (row["arm"], row["scheme"]) == ("flat", "w4a4")]
    assert events.Scalars("flat/w4a4/rtn/top1")[0].value == pytest.approx(top1)
    (hparams, *_) = (tmp_path / "run" / "tracking" / "tensorboard" / "run").glob("*/hparams.yml")
    assert "calibration_images: 48" in hparams.read_text()  # the protocol


@needs_tensorboard
def test_a_tracker_that_fails_does_not_end_a_training(tiny, planish, monkeypatch, tmp_path):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    ended = planish("flatten", *tiny, "--epochs", "1", "--out", "f.safetensors", "--track", "tensorboard")
    assert ended.status == 0, ended.err
    assert ended.out.count("note: tracking by tensorboard has failed and stops (OSError: no room)") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"f.safetensors", "f.jsonl", "f-tracking"}


def test_a_resumed_run_may_be_followed_elsewhere(tiny, planish, monkeypatch, tmp_path):
    monkeypatch.setattr("planish.recipes.journey.write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert planish("run", *tiny, *RUN).status == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    track = ["--track", "tensorboard"] if find_spec("tensorboard") else []
    ended = planish("run", "--resume", "--out", "run", "--trust", "--checkpoint-minutes", "3", *track)
    assert ended.status == 0, ended.err
    assert "checkpoint_minutes = 3.0" in (tmp_path / "run" / "config.toml").read_text()
