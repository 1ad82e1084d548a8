"""Rows to cells, the best of a column, and the outcome in a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from planish.report.summary import Cell, Column, outcome, summarize

RTN = Column("w3a3", "rtn")


def row(arm: str, scheme: str, top1: float | None, seed: int = 0, method: str = "rtn") -> dict[str, Any]:
    return {"arm": arm, "scheme": scheme, "method": method, "seed": seed, "top1": top1}


def test_seeds_become_mean_and_standard_error() -> None:
    cell = summarize([row("flat", "w3a3", v, s) for s, v in enumerate((0.80, 0.82, 0.87))]).get("flat", RTN)
    assert cell is not None
    assert cell.mean == pytest.approx(0.83)
    assert cell.error == pytest.approx(math.sqrt(0.0026 / 2) / math.sqrt(3))  # sd 0.0361 over root 3
    assert cell.text() == "83.0 \N{PLUS-MINUS SIGN} 2.1"
    assert cell.text("+-") == "83.0 +- 2.1"


def test_a_single_run_has_no_spread_and_a_tiny_one_is_not_zero() -> None:
    assert Cell(0.8514, None, 1).text() == "85.1"
    assert Cell(0.8514, 0.0001, 3).text("+-") == "85.1 +- <0.1"
    assert Cell(0.8514, 0.0, 3).text("+-") == "85.1 +- 0.0"


def test_the_later_row_of_a_seed_counts() -> None:
    cell = summarize([row("flat", "w3a3", 0.1), row("flat", "w3a3", 0.9)]).get("flat", RTN)
    assert cell == Cell(0.9, None, 1)


def test_order_of_arms_and_schemes() -> None:
    schemes = ["w2a4", "fp32", "odd", "w3", "w3a3", "w4a4", "w4a8", "w8a8"]
    rows = [row(arm, s, 0.5) for arm in ("flat", "mine", "given") for s in schemes]
    summary = summarize(rows)
    assert summary.arms == ["given", "flat", "mine"]
    assert summary.schemes == ["fp32", "w8a8", "w4a8", "w4a4", "w3", "w3a3", "w2a4", "odd"]


@pytest.mark.parametrize("top1", [None, math.nan, True, "0.5"])
def test_what_is_no_number_gives_no_cell(top1: Any) -> None:
    assert summarize([row("flat", "w3a3", top1)]).get("flat", RTN) is None


def test_full_precision_falls_back_to_fp_top1() -> None:
    summary = summarize([{**row("flat", "w3a3", 0.5), "fp_top1": 0.9}])
    assert str(summary.columns[0]) == "FP top-1"
    assert summary.get("flat", summary.columns[0]) == Cell(0.9, None, 1)


def test_best_is_shared_when_the_print_cannot_tell_and_needs_a_rival() -> None:
    rows = [row("given", "w3a3", 0.5), row("tuned", "w3a3", 0.8513), row("flat", "w3a3", 0.8511)]
    assert summarize(rows).best(RTN) == {"tuned", "flat"}
    assert summarize(rows[:1]).best(RTN) == set()


def test_outcome_shows_the_widest_gap_and_counts_all(fake: Callable[..., dict[str, Any]]) -> None:
    rows = [r for r in fake()["rows"] if r["scheme"] != "w2a4"]
    expected = "At w3a3, flat keeps 85.1 % top-1 where averaged, the best other arm, keeps 80.7 %; "
    assert outcome(summarize(rows)) == expected + "it leads in 2 of 2 quantized settings."


def test_outcome_does_not_hide_a_defeat() -> None:
    rows = [row("given", "w4a4", 0.8), row("flat", "w4a4", 0.81), row("given", "w3a3", 0.7), row("flat", "w3a3", 0.5)]
    expected = "At w3a3, flat keeps 50.0 % top-1 where given keeps 70.0 %; it leads in 1 of 2 quantized settings."
    assert outcome(summarize(rows)) == expected


def test_outcome_says_when_seeds_cannot_tell() -> None:
    rows = [row(arm, "w3a3", v + d, s) for arm, v in (("given", 0.7), ("flat", 0.71)) for s, d in enumerate((0, 0.1))]
    assert "a difference within twice its standard error" in outcome(summarize(rows))


def test_outcome_without_rivals_or_numbers() -> None:
    one = [row("given", "fp32", 0.9, method="none"), row("given", "w4a4", 0.8), row("given", "w3a3", 0.6)]
    assert outcome(summarize(one)) == "At w3a3, given keeps 60.0 % top-1 of its 90.0 % in full precision."
    assert outcome(summarize(one[:1])) == "Full-precision top-1: given 90.0 %; nothing was quantized."
    assert outcome(summarize([row("given", "w4a4", None)])) == "No accuracy was measured in this run."
    assert outcome(summarize([])) == "No accuracy was measured in this run."
    two = [row("tuned", "w4a4", 0.8), row("sam", "w4a4", 0.9, method="gptq"), row("sam", "w4a4", 0.9)]
    assert outcome(summarize(two)) == "At w4a4 with rtn, sam keeps 90.0 % top-1 where tuned keeps 80.0 %."
