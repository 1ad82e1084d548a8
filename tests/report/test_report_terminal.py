"""The terminal: results table, protocol card, environment."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from rich.console import Console

from planish.report.environment import environment, peak_memory_mb, protocol_card
from planish.report.table import print_table, results_lines


def test_plain_lines_are_ascii_with_stars_and_dashes(fake: Callable[..., dict[str, Any]]) -> None:
    lines = results_lines(fake()["rows"])
    assert lines[0].split("  ")[0] == "arm"
    assert lines[0].endswith("FP top-1  w4a4 rtn  w3a3 rtn  w2a4 rtn")
    assert lines[1].split() == ["given", "91.2", "86.1", "70.2", "-"]
    assert lines[4].split() == ["flat", "91.7", "89.6*", "85.1*", "59.8*"]
    assert all(line.isascii() for line in lines)
    assert results_lines([{"arm": "\u03bc", "scheme": "w4a4", "method": "rtn", "top1": 0.5}])[1].split() == [
        "\\u03bc",
        "50.0",
    ]
    assert any("85.1 +- 0.2*" in line for line in results_lines(fake(3)["rows"]))


def test_print_follows_the_terminal(fake: Callable[..., dict[str, Any]]) -> None:
    rows = [{**r, "arm": "[red]x" if r["arm"] == "given" else r["arm"]} for r in fake()["rows"]]
    plain, terminal = io.StringIO(), io.StringIO()
    print_table(rows, Console(file=plain, width=40))
    assert plain.getvalue().splitlines() == results_lines(rows)  # neither wrapped nor read as markup
    print_table(rows, Console(file=terminal, force_terminal=True, width=120, color_system="truecolor"))
    assert re.search(r"\x1b\[1m *85\.1\x1b", terminal.getvalue())
    assert "[red]x" in terminal.getvalue()
    assert "80.7" in terminal.getvalue()
    assert not re.search(r"\x1b\[1m *80\.7", terminal.getvalue())


def test_no_rows_is_no_accident() -> None:
    assert results_lines([])[0] == "arm"


def test_protocol_card_prints_every_setting(fake: Callable[..., dict[str, Any]]) -> None:
    protocol = {**fake()["protocol"], "name": "[bold]x", "nested": {"seed": 3}, "unknown": None}
    for force in (False, True):
        file = io.StringIO()
        protocol_card(protocol, Console(file=file, force_terminal=force, color_system=None, width=100))
        text = file.getvalue()
        assert "calibration images" in text
        assert "1024" in text
        assert "[bold]x" in text
        assert "nested.seed" in text
        assert "layer norms, softmax, residual sums" in text
        assert "unknown" not in text


def test_environment_says_what_numbers_depend_on() -> None:
    found = environment("cpu")
    assert {"planish", "python", "torch", "timm", "device", "cpu", "threads", "os"} <= set(found)
    assert found["device"] == "cpu"
    assert found["threads"] >= 1
    assert all(isinstance(value, (str, int)) and value != "" for value in found.values())


def test_peak_memory_is_in_megabytes() -> None:
    peak = peak_memory_mb("cpu")
    assert peak is None or 20 < peak < 1e5  # a Python process with torch, neither bytes nor gigabytes
