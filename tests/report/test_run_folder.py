"""The run folder: names, resuming, what is written, and what happens when the disk is full."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from planish.errors import PlanishError
from planish.report.folder import RunFolder

needs_full_device = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")


def test_a_run_appears_under_its_name_only_when_finished(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "runs" / "first")
    run.write_results({"rows": []})
    assert not (tmp_path / "runs" / "first").exists()
    assert run.path("results.json") == tmp_path / "runs" / ".first.partial" / "results.json"
    assert run.finish() == tmp_path / "runs" / "first"
    assert run.path("results.json") == tmp_path / "runs" / "first" / "results.json"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["first"]
    assert run.finish() == run.final  # twice is once


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "a").finish()
    for resume in (False, True):
        with pytest.raises(PlanishError, match=r"already there.*--out"):
            RunFolder.open(tmp_path / "a", resume)


def test_a_finished_run_has_nothing_to_resume_and_other_folders_are_no_runs(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.write_results({"rows": []})
    run.finish()
    with pytest.raises(PlanishError, match=r"a: this run is already there; .* or delete it"):
        RunFolder.open(tmp_path / "a")
    with pytest.raises(PlanishError, match="a: this run is finished, there is nothing to resume"):
        RunFolder.open(tmp_path / "a", resume=True)
    (tmp_path / "images").mkdir()
    for resume in (False, True):
        with pytest.raises(PlanishError, match="images: what is already there is no run") as raised:
            RunFolder.open(tmp_path / "images", resume)
        assert "delete" not in str(raised.value)
    with pytest.raises(PlanishError, match=r"images is no folder of a run: it holds no results\.json"):
        RunFolder.at(tmp_path / "images").read_results()


def test_an_interrupted_run_needs_resume(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "a").log({"step": 1})
    with pytest.raises(PlanishError, match=r"interrupted run.*--resume.*start over"):
        RunFolder.open(tmp_path / "a")
    run = RunFolder.open(tmp_path / "a", resume=True)
    run.log({"step": 2})
    assert run.path("log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_resume_needs_an_interrupted_run(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"no interrupted run to resume"):
        RunFolder.open(tmp_path / "a", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_log_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.log({"step": 1})
    with open(run.path("log.jsonl"), "a") as file:
        file.write('{"step": 2, "lo')
    run = RunFolder.open(tmp_path / "a", resume=True)
    run.log({"step": 3})
    assert [json.loads(line)["step"] for line in run.path("log.jsonl").read_text().splitlines()] == [1, 3]


@dataclass
class Settings:
    scheme: str = "w4a4"
    seed: int = 0
    weights: Path | None = None
    resume: bool = False


def test_config_is_nested_toml_without_none(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.write_config({"train": Settings(), "schemes": ("w4a4", "w3a3"), "out": Path("runs/a"), "limit": None})
    text = run.path("config.toml").read_text()
    assert "limit" not in text
    assert "weights" not in text
    assert '[train]\nscheme = "w4a4"' in text
    assert 'out = "runs/a"' in text
    assert "w3a3" in text


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "a").write_config({"train": {"lr": 0.1, "seed": 0}, "resume": False})
    run = RunFolder.open(tmp_path / "a", resume=True)
    run.write_config({"train": {"lr": 0.1, "seed": 0}, "resume": True})  # the same run
    with pytest.raises(PlanishError, match=r"train\.lr was 0\.1, is 0\.2; train\.seed was 0, is unset"):
        run.write_config({"train": {"lr": 0.2}, "resume": True})
    assert "lr = 0.1" in run.path("config.toml").read_text()


def test_numbers_that_json_cannot_hold_are_null_in_the_log(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    run = RunFolder.open(tmp_path / "a")
    run.log({"loss": math.nan, "max": math.inf, "mean": torch.tensor(0.5), "name": "\N{GREEK SMALL LETTER MU}\n\udc80"})
    lines = run.path("log.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == {"loss": None, "max": None, "mean": 0.5, "name": "\u03bc\n\udc80"}


def test_results_come_back_and_unmeasured_numbers_are_absent(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.write_results({"protocol": {"seed": 0}, "rows": [{"arm": "flat", "top1": 0.5, "nll": None}]})
    run.write_results({"protocol": {"seed": 1}, "rows": [{"arm": "flat", "top1": 0.5, "nll": None, "ece": math.nan}]})
    assert run.read_results() == {"protocol": {"seed": 1}, "rows": [{"arm": "flat", "top1": 0.5, "ece": None}]}
    assert [p.name for p in run.folder.iterdir()] == ["results.json"]
    run.finish()
    assert RunFolder.at(tmp_path / "a").read_results()["protocol"] == {"seed": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', "\xff"])
def test_a_damaged_results_file_is_named(tmp_path: Path, text: str) -> None:
    run = RunFolder.open(tmp_path / "a")
    with pytest.raises(PlanishError, match="no results were written"):
        run.read_results()
    run.path("results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanishError, match=r"results\.json: not a"):
        run.read_results()


def test_reading_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="there is no run here"):
        RunFolder.at(tmp_path / "a")


@needs_full_device
@pytest.mark.parametrize("name", ["log.jsonl", "results.json", "config.toml"])
def test_a_full_disk_names_the_file_and_resume(tmp_path: Path, name: str) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.path(name if name == "log.jsonl" else f".{name}.new").symlink_to("/dev/full")
    write = {"log.jsonl": run.log, "results.json": run.write_results, "config.toml": run.write_config}[name]
    with pytest.raises(PlanishError, match=rf"{name}: cannot write here \(the disk is full: make room\)"):
        write({"rows": []})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanishError, match="cannot write here"):
        RunFolder.open(tmp_path / "file" / "run")
    with pytest.raises(PlanishError, match="folder name of its own"):
        RunFolder.open("/")


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a", active=False)
    run.write_config({"a": 1})
    run.log({"step": 1})
    run.write_results({"rows": []})
    assert run.finish() == tmp_path / "a"
    assert list(tmp_path.iterdir()) == []


def test_half_files_of_a_killed_process_are_deleted(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a")
    run.write_results({"rows": []})
    for name in (".flat.safetensors.77.tmp", ".results.json.new", "flat.tmp"):
        run.path(name).write_text("half")
    RunFolder.open(tmp_path / "a", resume=True)
    assert sorted(path.name for path in run.folder.iterdir()) == ["flat.tmp", "results.json"]
