"""Several runs as one: what is averaged, what stands apart, and that differences are told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.errors import PlanishError
from planish.report.compare import Run, compare, read_runs
from planish.report.html import render_report
from planish.report.summary import Column, summarize

RTN = Column("w4a4", "rtn")


def run(
    name: str, top1: float, *, seed: int = 0, arms: tuple[str, ...] = ("flat",), complete: bool = True, **protocol: Any
) -> Run:
    """A run of w4a4 by rtn with these arms, all with the same top-1."""
    rows = [{"arm": arm, "scheme": "w4a4", "method": "rtn", "seed": seed, "fp_top1": 0.9, "top1": top1} for arm in arms]
    settings = {
        "model": "vit",
        "epochs": 6,
        "scheme_w4a4": "4 bits",
        "seed": seed,
        "calibration_seed": seed,
        **protocol,
    }
    settings |= {"fp_top1": 0.9 + seed, "seconds_training": {"flat": 10.0 + seed}}
    return Run(name, {"protocol": settings, "environment": {"planish": "1", "os": "X"}, "rows": rows}, complete)


def top1(runs: list[Run]) -> dict[str, float]:
    summary = summarize(compare(runs).rows)
    return {arm: cell.mean for arm in summary.arms if (cell := summary.get(arm, RTN))}


def test_seeds_of_equal_runs_are_averaged() -> None:
    found = compare([run("a", 0.80), run("b", 0.82, seed=1), run("c", 0.84, seed=10)])
    summary = summarize(found.rows)
    cell = summary.get("flat", RTN)
    assert cell is not None
    assert (cell.mean, cell.seeds) == (pytest.approx(0.82), 3)
    assert found.notes == ["flat: the seeds 0, 1 and 10 of a, b and c are averaged."]
    assert found.caution == ""
    assert found.differences == {"seed": ["0", "1", "10"], "calibration_seed": ["0", "1", "10"]}
    assert [row["run"] for row in found.rows] == ["a", "b", "c"]


@pytest.mark.parametrize("other", [{"epochs": 3}, {"model": "convnet"}, {"scheme_w4a4": "other"}, {"new": "setting"}])
def test_another_setting_keeps_runs_apart_and_is_told(other: dict[str, Any]) -> None:
    runs = [run("a", 0.80), run("b", 0.82, seed=1, **other)]
    assert top1(runs) == {"a: flat": 0.80, "b: flat": 0.82}
    found = compare(runs)
    (key,) = other
    assert found.notes[0] == f"flat: a and b differ in {key}, so each has a row of its own."
    assert found.caution == f"The protocols of the runs differ in {key}."
    assert found.differences[key][1] == str(other[key])


def test_another_version_keeps_runs_apart_another_machine_does_not() -> None:
    a, b = run("a", 0.80), run("b", 0.82, seed=1)
    b.results["environment"]["os"] = "Y"
    assert top1([a, b]) == {"flat": pytest.approx(0.81)}
    assert compare([a, b]).differences["environment.os"] == ["X", "Y"]
    b = run("b", 0.82, seed=1)
    b.results["environment"]["planish"] = "2"
    assert set(top1([a, b])) == {"a: flat", "b: flat"}


def test_one_seed_measured_twice_counts_once_if_equal_and_apart_if_not() -> None:
    assert top1([run("a", 0.80), run("b", 0.80)]) == {"flat": 0.80}
    found = compare([run("a", 0.80), run("b", 0.80)])
    assert len(found.rows) == 1
    assert found.notes == ["flat: with the same seed in a and b, so taken together; numbers that they share are equal."]
    assert top1([run("a", 0.80), run("b", 0.81)]) == {"a: flat": 0.80, "b: flat": 0.81}
    assert "different results for one seed" in compare([run("a", 0.80), run("b", 0.81)]).notes[0]


def test_settings_count_only_for_the_arms_that_depend_on_them() -> None:
    arms = ("given", "tuned", "flat")
    runs = [run("a", 0.80, arms=arms), run("b", 0.82, seed=1, arms=arms, weight_noise="residual")]
    assert top1(runs) == {"given": pytest.approx(0.81), "tuned": pytest.approx(0.81), "a: flat": 0.80, "b: flat": 0.82}
    runs = [run("a", 0.80, arms=arms), run("b", 0.82, seed=1, arms=arms, epochs=1)]
    assert set(top1(runs)) == {"given", "a: tuned", "b: tuned", "a: flat", "b: flat"}


def test_a_scheme_that_only_one_run_has_keeps_nothing_apart() -> None:
    assert top1([run("a", 0.80), run("b", 0.82, seed=1, scheme_w3a3="3 bits")]) == {"flat": pytest.approx(0.81)}


def test_arms_of_one_run_alone_keep_their_names() -> None:
    runs = [run("a", 0.80, arms=("flat",)), run("b", 0.7, arms=("tuned",), epochs=3)]
    assert top1(runs) == {"tuned": 0.7, "flat": 0.80}
    assert "differ in epochs" in compare(runs).caution


def test_groups_of_runs_are_named_by_the_first() -> None:
    runs = [run("a", 0.80), run("b", 0.82, seed=1), run("c", 0.5, epochs=1)]
    assert top1(runs) == {"a+b: flat": pytest.approx(0.81), "c: flat": 0.5}
    assert set(top1([*runs, run("d", 0.8, seed=2)])) == {"a+2 more: flat", "c: flat"}
    long = "a-run-with-a-longer-name"
    assert set(top1([run(long, 0.8), run("b", 0.8, seed=1), run("c", 0.5, epochs=1)])) == {
        f"{long}+1 more: flat",
        "c: flat",
    }


def test_an_incomplete_run_is_said_to_be() -> None:
    found = compare([run("a", 0.8), run("b", 0.8, seed=1, complete=False)])
    assert found.notes[0] == "b is incomplete: it was interrupted after 1 row."


def test_the_page_shows_what_differs_and_what_was_done() -> None:
    evil = "<b>b</b>"
    found = compare([run("a", 0.80), run(evil, 0.82, epochs=3)])
    text = render_report(found.as_results())
    assert "<h1>planish: 2 runs compared</h1>" in text
    assert "What differs between the runs." in text
    assert evil not in text
    assert '<tr><th scope="row">epochs</th><td>6</td><td>3</td></tr>' in text
    assert "<dt>epochs</dt>" not in text
    assert "<dt>model</dt><dd>vit</dd>" in text
    assert "<dt>os</dt><dd>X</dd>" in text
    assert "so each has a row of its own." in text
    assert "a: flat" in text
    assert "it leads in" not in text
    assert re.search(r'class="outcome">At w4a4.* The protocols of the runs differ in epochs\.</p>', text)


Fake = Callable[..., dict[str, Any]]


@pytest.fixture
def folders(fake: Fake, tmp_path: Path) -> list[Path]:
    """A finished run and an interrupted one."""
    places = [tmp_path / "one", tmp_path / ".two.partial"]
    for number, place in enumerate(places):
        results = fake()
        results["rows"] = [{**row, "seed": number} for row in results["rows"]]
        place.mkdir()
        (place / "results.json").write_text(json.dumps(results))
    return [tmp_path / "one", tmp_path / "two"]


def test_runs_are_read_finished_or_interrupted(folders: list[Path], tmp_path: Path) -> None:
    runs = read_runs(folders)
    assert [(r.name, r.complete) for r in runs] == [("one", True), ("two", False)]
    assert [(r.name, r.complete) for r in read_runs([folders[0], tmp_path / ".two.partial"])] == [
        ("one", True),
        ("two", False),
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").rename(tmp_path / "deep" / "two")
    assert [r.name for r in read_runs([tmp_path / "deep" / "two", folders[1]])] == ["deep/two", f"{tmp_path.name}/two"]


def test_what_is_no_run_is_named(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="two runs or more, got 1"):
        read_runs(folders[:1])
    with pytest.raises(PlanishError, match=r"nothing: there is no run here"):
        read_runs([folders[0], tmp_path / "nothing"])
    with pytest.raises(PlanishError, match="named twice"):
        read_runs([folders[1], tmp_path / ".two.partial"])
    results = tmp_path / ".two.partial" / "results.json"
    for rows, words in (([], "nothing was measured in this run yet"), ([3], "expected objects")):
        results.write_text(json.dumps({"rows": rows}))
        with pytest.raises(PlanishError, match=words):
            read_runs(folders)
    results.unlink()
    with pytest.raises(PlanishError, match="no results were written"):
        read_runs(folders)
