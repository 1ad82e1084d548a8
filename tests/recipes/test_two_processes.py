"""Commands in two processes: all compute, the main one prints and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from planish.cli.main import main
from tests.cli.conftest import MODEL, make_images
from tests.processes import finish, start_two

ARMS = ("given", "averaged", "flat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.py").write_text(MODEL)
    make_images(folder / "data")
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    return finish(start_two("tests.recipes.two_processes", str(folder)), timeout=400)


def rows(run: Path) -> list[dict]:
    found = json.loads((run / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in found]


def test_both_end_alike(printed):
    ended = [json.loads(out.splitlines()[-1]) for out, _ in printed]
    assert ended[0] == ended[1]
    assert ended[0] == {
        "whole": 0, "again": 2, "interrupted": 130, "resumed": 0, "flatten": 0, "quantize": 0, "train": 0,
        "evaluate": 0, "evaluate trained": 0,
    }  # fmt: skip


def test_the_main_process_alone_prints(printed):
    (first, errors), (second, other_errors) = printed
    assert first.count("report: ") == 2
    assert first.count("flat: w4a4 by rtn") == 2  # a resumed run tells what was left only
    assert second.strip().count("\n") == 0  # what the script prints itself
    assert errors.count("planish: whole: this run is already there") == 1
    assert errors.count("continue with: planish run --resume --out broken") == 1
    assert other_errors.count("planish (process 1): whole: this run is already there") == 1
    assert "interrupted" not in other_errors


def test_the_run_folder_is_written_once(printed, folder):
    names = {"config.toml", "log.jsonl", "results.json", "report.html"}
    names |= {f"{arm}{rest}.safetensors" for arm in ARMS for rest in ("", "-w4a4-rtn")}
    assert {path.name for path in (folder / "whole").iterdir()} == names
    events = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    epochs = [(event["arm"], event["epoch"]) for event in events if event["event"] == "epoch"]
    assert epochs == [(arm, epoch) for arm in ("averaged", "flat") for epoch in (1, 2)]
    assert sum(event["event"] == "pass" for event in events) == 3 * len(ARMS)
    assert json.loads((folder / "whole" / "results.json").read_text())["protocol"]["processes"] == 2
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "tiny.py", "trained.json",
        *(f"{name}.{end}" for name in ("flat", "small", "trained") for end in ("safetensors", "jsonl")),
    }  # fmt: skip


def test_an_interrupted_run_resumes_to_the_identical_result(printed, folder):
    assert len(rows(folder / "whole")) == 6
    assert rows(folder / "broken") == rows(folder / "whole")
    for arm in ARMS:
        name = f"{arm}.safetensors"
        assert (folder / "broken" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_one_process_comes_to_the_same_result(printed, folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = ["--model", "tiny.py:build", "--data", "data", "--batch-size", "4", "--threads", "1", "--epochs", "2"]
    assert (
        main(["run", *options, "--arms", "given,averaged", "--methods", "rtn", "--schemes", "w4a4", "--out", "alone"])
        == 0
    )
    ours, theirs = (load_file(folder / name / "averaged.safetensors") for name in ("alone", "whole"))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=1e-4)
    for mine, both in zip(rows(folder / "alone"), rows(folder / "whole"), strict=False):
        assert mine == pytest.approx(both, abs=1e-4)


def test_another_number_of_processes_does_not_continue_it(printed, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["run", "--resume", "--out", "left", "--trust"]) == 2
    assert "cannot resume with other settings (processes was 2, is unset)" in capsys.readouterr().err
