"""``planish diagnose`` on the tiny network: what it leaves, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

STAGES = {"errors", "split", "curvature", "sharpness", "landscape", "prediction", "damage"}
FEW = ["--schemes", "w8a8,w3a3", "--scheme", "w3a3"]


@pytest.fixture(scope="module")
def looked(shared, options, tmp_path_factory):
    """A network and a flattened one, looked at, and what was printed."""
    import contextlib
    import io

    from planish.cli.main import main

    folder = tmp_path_factory.mktemp("looked")
    flat, printed = folder / "flat.safetensors", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["flatten", *options, "--scheme", "w3a3", "--epochs", "1", "--out", str(flat)]) == 0
        assert main(["diagnose", *options, *FEW, "--against", str(flat), "--out", str(folder / "run")]) == 0
    return folder / "run", printed.getvalue()


def test_the_folder_holds_every_stage_of_every_network(looked):
    out, _ = looked
    assert {path.name for path in out.iterdir()} == {"config.toml", "results.json", "report.html"}
    results = json.loads((out / "results.json").read_text())
    flatness = results["flatness"]
    assert list(flatness["networks"]) == ["given", "flat"]
    for found in flatness["networks"].values():
        assert set(found) == {*STAGES, "fp_top1", "loss", "spared"}
        assert [p["scheme"] for p in found["prediction"]] == ["w8a8", "w3a3"]
        assert all(0 <= p["measured_top1"] <= 1 for p in found["prediction"])
        assert len(found["damage"]["corruptions"]) == 20
        assert found["split"]["both"] == pytest.approx(
            found["split"]["weights"] + found["split"]["activations"] + found["split"]["interaction"]
        )
    keys = [(row["arm"], row["scheme"]) for row in results["rows"]]
    assert keys == [(arm, scheme) for arm in ("given", "flat") for scheme in ("fp32", "w8a8", "w3a3")]
    assert all({"top1", "nll", "ece", "flip_rate", "fp_top1"} <= set(row) for row in results["rows"])
    assert all(row["flip_rate"] == 0 for row in results["rows"] if (row["arm"], row["scheme"]) == ("given", "fp32"))
    assert results["protocol"]["looked_at_scheme"] == "w3a3"
    assert len(flatness["advice"]) >= 3
    assert (out / "report.html").read_text().count("<svg") >= 5


def test_the_rounded_network_is_that_of_planish_quantize(looked, tiny, planish, tmp_path):
    out, _ = looked
    rows = {(r["arm"], r["scheme"]): r for r in json.loads((out / "results.json").read_text())["rows"]}
    assert planish("quantize", *tiny, "--scheme", "w3a3", "--out", "small.safetensors").status == 0
    ended = planish("evaluate", "small.safetensors", *tiny[2:], "--trust")
    assert f"top1       {rows['given', 'w3a3']['top1']:.2%}" in ended.out
    assert f"nll        {rows['given', 'w3a3']['nll']:.4f}" in ended.out


def test_the_findings_are_printed(looked):
    out, printed = looked
    lines = printed.splitlines()
    assert any(line.startswith("given: w3a3 adds ") and "Hessian trace" in line for line in lines)
    assert any(line.startswith("flat: w3a3 adds ") for line in lines)
    assert any("Rounding alone keeps" in line or "No scheme stays" in line for line in lines)
    assert lines[-1] == f"report: {out / 'report.html'}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
@pytest.mark.parametrize(("line", "network"), [(6, "given"), (14, "flat")])
def test_a_stopped_diagnosis_goes_on_to_the_identical_result(zygote, options, tmp_path, looked, line, network):
    argv = ["diagnose", *options, *FEW, "--against", str(looked[0].parent / "flat.safetensors"), "--out", "run"]
    ended = zygote.run(tmp_path, argv, kill=signal.SIGINT, after=line, delay=0.05)
    assert ended.status == 130, ended.err
    assert "continue with: planish diagnose --resume --out run" in ended.err
    kept = json.loads((tmp_path / ".run.partial" / "results.json").read_text())
    assert network in kept["flatness"]["networks"]
    assert "advice" not in kept["flatness"]
    ended = zygote.run(tmp_path, ["diagnose", "--resume", "--out", "run", "--trust"])
    assert ended.status == 0, ended.err
    mine, theirs = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "run", looked[0]))
    assert mine["rows"] == theirs["rows"]
    assert mine["flatness"] == theirs["flatness"]


def test_the_arms_of_a_run_are_looked_at_in_its_own_report(tiny, planish, tmp_path):
    run = [
        "run",
        *tiny,
        "--arms",
        "given,flat",
        "--methods",
        "rtn",
        "--schemes",
        "w3a3",
        "--epochs",
        "1",
        "--out",
        "run",
    ]
    assert planish(*run).status == 0
    before = json.loads(Path("run/results.json").read_text())
    small = Path("run/report.html").read_text()
    ended = planish("diagnose", "run", *FEW, "--trust")
    assert ended.status == 0, ended.err
    after = json.loads(Path("run/results.json").read_text())
    assert after["rows"] == before["rows"]
    assert after["protocol"] == before["protocol"]
    assert set(after["flatness"]["networks"]) == {"given", "flat"}
    measured = {p["scheme"]: p["measured_top1"] for p in after["flatness"]["networks"]["flat"]["prediction"]}
    row = next(r for r in before["rows"] if (r["arm"], r["scheme"]) == ("flat", "w3a3"))
    assert measured == {"w8a8": None, "w3a3": row["top1"]}
    assert len(Path("run/report.html").read_text()) > len(small)
    again = planish("diagnose", "run", *FEW, "--trust")  # nothing is done twice
    assert again.status == 0
    assert json.loads(Path("run/results.json").read_text()) == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "absent.safetensors"], "--against absent.safetensors: no such file"),
        (["--scheme", "w1a1"], "w1a1"),
        (["--images", "-1"], "images is -1: give at least 1"),
        (["--resume"], "give it with --out"),
        (["--allow", "nothing*"], "--allow 'nothing*' matches no matrix product"),
    ],
)
def test_bad_input_is_one_sentence(tiny, planish, tmp_path, arguments, message):
    ended = planish("diagnose", *tiny, *arguments)
    assert ended.status == 2
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not list(Path("runs").glob("*")) if Path("runs").exists() else True


def test_a_quantized_file_is_refused_before_anything_is_measured(tiny, planish):
    assert planish("quantize", *tiny, "--out", "q.safetensors").status == 0
    ended = planish("diagnose", *tiny, *FEW, "--against", "q.safetensors", "--out", "d")
    assert ended.status == 2
    assert "--against q.safetensors: a quantized model; give weights in float" in ended.err
    assert not Path(".d.partial").exists()


def test_folders_that_are_no_runs(tiny, planish, tmp_path):
    Path("empty").mkdir()
    assert "empty is no folder of a run: it holds no results.json" in planish("diagnose", "empty").err
    ended = planish("diagnose", "empty", "--out", "x")
    assert "leave --out, --resume and --against away" in ended.err
