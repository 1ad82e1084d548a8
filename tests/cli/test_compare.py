"""``planish compare`` as a user gives it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Three runs: two seeds of one protocol, and an interrupted one of another."""
    monkeypatch.chdir(tmp_path)
    for name, seed, epochs in (("a", 0, 6), ("b", 1, 6), (".c.partial", 0, 3)):
        rows = [
            {"arm": arm, "scheme": scheme, "method": "rtn", "seed": seed, "fp_top1": 0.9, "top1": top1 + 0.02 * seed}
            for arm, tops in (("given", (0.8, 0.6)), ("flat", (0.85, 0.75)))
            for scheme, top1 in zip(("w4a4", "w3a3"), tops, strict=True)
        ]
        results = {"protocol": {"model": "vit", "epochs": epochs, "seed": seed}, "rows": rows}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_one_table_of_several_runs(runs, planish):
    ended = planish("compare", "runs/a", "runs/b", "runs/c")
    assert ended.status == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines()]
    assert lines[:3] == [["differs", "a", "b", "c"], ["epochs", "6", "6", "3"], ["seed", "0", "1", "0"]]
    table = {line[0]: line for line in lines if line and line[0] in ("arm", "given", "a")}
    assert table["arm"] == ["arm", "FP", "top-1", "w4a4", "rtn", "w3a3", "rtn"]
    assert table["given"][-6:] == ["81.0", "+-", "1.0", "61.0", "+-", "1.0"]
    assert [line for line in ended.out.splitlines() if line.startswith("c: flat ")]
    assert "c is incomplete: it was interrupted after 4 rows." in ended.out
    assert "given: the seeds 0 and 1 of a, b and c are averaged." in ended.out
    assert "flat: the seeds 0 and 1 of a and b are averaged." in ended.out
    assert "flat: a+b and c differ in epochs, so each has a row of its own." in ended.out
    assert [
        line
        for line in ended.out.splitlines()
        if re.match(r"At w.*\. The protocols of the runs differ in epochs\.$", line)
    ]
    assert list(runs.glob("*.html")) == []


def test_one_page_of_several_runs(runs, planish):
    ended = planish("compare", "runs/a", "runs/b", "--out", "both.html")
    assert ended.status == 0, ended.err
    assert ended.out.endswith("page: both.html\n")
    page = Path("both.html").read_text()
    assert "planish: 2 runs compared" in page
    assert page.count("<svg") == 1
    assert "The protocols of the runs differ" not in page
    again = planish("compare", "runs/a", "runs/b", "--out", "both.html")
    assert again.status == 2
    assert "already there" in again.err
    assert planish("compare", "runs/a", "runs/b", "--out", "both.html", "--overwrite").status == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "two runs or more, got 0"),
        (["runs/a"], "two runs or more, got 1"),
        (["runs/a", "runs/nothing"], "runs/nothing: there is no run here"),
        (["runs/a", "runs/../runs/a"], "named twice"),
        (["runs/a", "runs/b", "--out", "nowhere/page.html"], "the folder nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence(runs, planish, arguments, words):
    ended = planish("compare", *arguments)
    assert ended.status == 2
    assert ended.err.startswith("planish: ")
    assert ended.err.count("\n") == 1
    assert words in ended.err


def test_nothing_heavy_is_imported_for_a_table(runs):
    program = (
        "import sys\nfrom planish.cli.main import main\nassert main(['compare', 'runs/a', 'runs/b']) == 0\n"
        "print([m for m in ('torch', 'timm', 'accelerate', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
