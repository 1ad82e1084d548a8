"""From rows to what a reader compares: arms against schemes and methods, seeds averaged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

ARMS = ("given", "tuned", "averaged", "sam", "flat")
FP = "fp32"


@dataclass(frozen=True)
class Cell:
    """Top-1 of one arm in one column, as a fraction: the mean over seeds and its standard error."""

    mean: float
    error: float | None  # None: a single run, so no spread is known
    seeds: int

    @property
    def mean_text(self) -> str:
        return percent(self.mean)

    @property
    def error_text(self) -> str:
        """``0.3``; a spread too small for the decimal is ``<0.1``, for it is not nothing; empty for a single run."""
        if self.error is None:
            return ""
        return "<0.1" if 0 < self.error < 0.0005 else percent(self.error)

    def text(self, plus_minus: str = "\N{PLUS-MINUS SIGN}") -> str:
        """In percent, with one decimal: ``85.1`` or ``85.1 ± 0.3``."""
        return f"{self.mean_text} {plus_minus} {self.error_text}" if self.error_text else self.mean_text


@dataclass(frozen=True)
class Column:
    """One way to measure an arm: in full precision (scheme ``fp32``), or quantized by a scheme and a method."""

    scheme: str
    method: str

    @property
    def is_fp(self) -> bool:
        return self.scheme == FP

    def __str__(self) -> str:
        return "FP top-1" if self.is_fp else f"{self.scheme} {self.method}"


@dataclass(frozen=True)
class Summary:
    """All cells of a run. ``columns`` begins with full precision if it was measured, then in order of fewer bits."""

    arms: list[str]
    columns: list[Column]
    cells: dict[tuple[str, Column], Cell]

    def get(self, arm: str, column: Column) -> Cell | None:
        return self.cells.get((arm, column))

    def best(self, column: Column) -> set[str]:
        """The arms that lead a column, as far as the printed decimals can tell; none if there is no rival."""
        shown = {arm: percent(cell.mean) for arm in self.arms if (cell := self.get(arm, column))}
        top = max(shown.values(), key=float, default="")
        return {arm for arm, text in shown.items() if text == top} if len(shown) > 1 else set()

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(column.method for column in self.columns if not column.is_fp))

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(column.scheme for column in self.columns))

    @property
    def seeds(self) -> tuple[int, int]:
        """The least and the largest number of seeds behind a cell."""
        counts = [cell.seeds for cell in self.cells.values()]
        return min(counts, default=0), max(counts, default=0)


def percent(fraction: float) -> str:
    """0.8514 as ``85.1``."""
    return f"{100 * fraction:.1f}"


def summarize(rows: Iterable[Mapping[str, Any]]) -> Summary:
    """Average the top-1 of ``rows`` (results.json) over seeds; of two rows for one seed the later one counts.

    A row without a finite ``top1`` gives no cell. Full precision comes from the rows with scheme ``fp32``, and for an
    arm without any from ``fp_top1`` of its other rows.
    """
    values: dict[tuple[str, Column], dict[Any, float]] = {}
    fallback: dict[str, dict[Any, float]] = {}
    arms: dict[str, None] = {}
    columns: dict[Column, None] = {}
    fp = Column(FP, "none")
    for row in rows:
        arm, scheme, seed = str(row.get("arm", "?")), str(row.get("scheme", "?")), row.get("seed")
        column = fp if scheme == FP else Column(scheme, str(row.get("method", "?")))
        arms.setdefault(arm)
        columns.setdefault(column)
        if (top1 := _number(row.get("top1"))) is not None:
            values.setdefault((arm, column), {})[seed] = top1
        if (fp_top1 := _number(row.get("fp_top1"))) is not None:
            fallback.setdefault(arm, {})[seed] = fp_top1
    for arm, by_seed in fallback.items():
        values.setdefault((arm, fp), by_seed)
        columns.setdefault(fp)
    cells = {key: _cell(list(by_seed.values())) for key, by_seed in values.items()}
    ordered = sorted(columns, key=lambda column: bits_key(column.scheme))  # stable: methods keep their order
    return Summary(sorted(arms, key=lambda a: ARMS.index(a) if a in ARMS else len(ARMS)), ordered, cells)


def outcome(summary: Summary) -> str:
    """The result in one sentence. It shows the column with the widest gap and says how often the arm leads at all."""
    quantized = [column for column in summary.columns if not column.is_fp]
    measured = [c for c in quantized if any(summary.get(arm, c) for arm in summary.arms)]
    if not measured:
        return _outcome_unquantized(summary)
    arm = _protagonist(summary, measured)
    pairs = [(c, cell, rival) for c in measured if (cell := summary.get(arm, c)) and (rival := _rival(summary, arm, c))]
    if not pairs:
        column = next(c for c in reversed(measured) if summary.get(arm, c))
        fp, cell = next((summary.get(arm, c) for c in summary.columns if c.is_fp), None), summary.cells[arm, column]
        before = f" of its {percent(fp.mean)} % in full precision" if fp else ""
        return f"At {_place(summary, column)}, {arm} keeps {percent(cell.mean)} % top-1{before}."
    column, cell, (other, other_cell) = max(pairs, key=lambda pair: abs(pair[1].mean - pair[2][1].mean))
    leads = sum(a.mean > b.mean for _, a, (_, b) in pairs)
    several = len(summary.arms) > 2
    sentence = (
        f"At {_place(summary, column)}, {arm} keeps {percent(cell.mean)} % top-1 where {other}"
        f"{', the best other arm,' if several else ''} keeps {percent(other_cell.mean)} %"
    )
    noise = math.hypot(cell.error or 0, other_cell.error or 0)
    if cell.error is not None and other_cell.error is not None and abs(cell.mean - other_cell.mean) < 2 * noise:
        sentence += ", a difference within twice its standard error"
    return sentence + (f"; it leads in {leads} of {len(pairs)} quantized settings." if len(pairs) > 1 else ".")


def _outcome_unquantized(summary: Summary) -> str:
    parts = [f"{arm} {percent(cell.mean)} %" for (arm, _), cell in summary.cells.items()]
    if not parts:
        return "No accuracy was measured in this run."
    return f"Full-precision top-1: {', '.join(parts)}; nothing was quantized."


def _protagonist(summary: Summary, columns: Sequence[Column]) -> str:
    if any(summary.get("flat", column) for column in columns):
        return "flat"
    return max(
        reversed(summary.arms), key=lambda arm: (sum(arm in summary.best(c) for c in columns), _count(summary, arm))
    )


def _count(summary: Summary, arm: str) -> int:
    return sum(1 for name, column in summary.cells if name == arm and not column.is_fp)


def _rival(summary: Summary, arm: str, column: Column) -> tuple[str, Cell] | None:
    others = [(a, cell) for a in summary.arms if a != arm and (cell := summary.get(a, column))]
    return max(others, key=lambda pair: pair[1].mean, default=None)


def _place(summary: Summary, column: Column) -> str:
    return f"{column.scheme} with {column.method}" if len(summary.methods) > 1 else column.scheme


def _cell(values: list[float]) -> Cell:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Cell(fmean(values), error, len(values))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def bits_key(scheme: str) -> tuple[int, int, int]:
    if scheme == FP:
        return (0, 0, 0)
    match = re.fullmatch(r"w(\d+)(?:a(\d+))?.*", scheme.lower())
    if not match:
        return (2, 0, 0)
    return (1, -int(match[1]), -int(match[2] or 32))
