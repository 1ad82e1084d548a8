"""Means, standard errors and paired differences, against NumPy."""

import numpy as np
import pytest
from planish_docs.tables import cell, figures, grid, in_order, less, table

ROWS = [{"scheme": "w4a4", "seed": str(seed), "top1": str(top1)} for seed, top1 in enumerate((0.91, 0.915, 0.926))] + [
    {"scheme": "w2a4", "seed": "0", "top1": "0.5"}
]


def test_a_cell():
    values = [91.0, 91.5, 92.6]
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert cell(values) == f"{np.mean(values):.2f} ± {error:.2f}" == "91.70 ± 0.47"
    assert cell(values[:2]) == "91.25 ± 0.25 (2 seeds)"
    assert cell([50.0]) == "50.00 (1 seed)"
    assert cell([]) == ""
    assert cell([0.5] * 3, sign="+") == "+0.50 ± 0.00"


def test_differences_are_paired_by_seed():
    mine = figures(ROWS)
    other = {"w4a4": {"0": 90.0, "2": 92.0, "7": 1.0}, "w3a3": {"0": 1.0}}
    found = less(mine, other)
    assert found.keys() == {"w4a4"}
    assert found["w4a4"] == pytest.approx({"0": 1.0, "2": 0.6})


def test_a_seed_that_was_measured_twice_is_an_error():
    with pytest.raises(ValueError, match="w2a4 was measured twice with seed 0"):
        figures([*ROWS, ROWS[-1]])


def test_columns_go_from_many_bits_to_few():
    assert in_order(["w2a2", "w4a4", "w2a4", "float", "w8a8", "w3a3", "w6a6"]) == [
        "float", "w8a8", "w6a6", "w4a4", "w3a3", "w2a4", "w2a2",
    ]  # fmt: skip


def test_a_table():
    text = table("arms", [("a", figures(ROWS), "3"), ("a - b", {"w4a4": {"0": 1.0}}, "")], "seconds", ["a - b"])
    assert text.splitlines() == [
        "| arms | w4a4 | w2a4 | seconds |",
        "|---|---|---|---|",
        "| a | 91.70 ± 0.47 | 50.00 (1 seed) | 3 |",
        "| a - b | +1.00 (1 seed) |  |  |",
    ]
    assert "KL(a \\| b)" in grid(("x",), [("KL(a | b)",)])
