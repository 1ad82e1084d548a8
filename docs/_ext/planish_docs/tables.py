"""Measured figures as Markdown tables: rows of a benchmark's CSV in, means with standard errors out."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Figures = dict[str, dict[str, float]]  # scheme -> seed -> a figure in percent

FLOAT = "float"  # the column of the full-precision network


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def figures(rows: Iterable[Mapping[str, str]], column: str = "top1") -> Figures:
    """The figures of one arm on one network, in percent; a seed that occurs twice is an error.

    Args:
        rows: with the columns ``scheme``, ``seed`` and ``column`` (a share).
        column: which figure.
    """
    found: Figures = {}
    for row in rows:
        seeds = found.setdefault(row["scheme"], {})
        if row["seed"] in seeds:
            raise ValueError(f"{row['scheme']} was measured twice with seed {row['seed']}: {dict(row)}")
        seeds[row["seed"]] = 100 * float(row[column])
    return found


def less(figures: Figures, reference: Figures) -> Figures:
    """The differences, paired by scheme and seed; what only one of them has is left out."""
    paired = {
        scheme: {seed: value - reference[scheme][seed] for seed, value in seeds.items() if seed in reference[scheme]}
        for scheme, seeds in figures.items()
        if scheme in reference
    }
    return {scheme: seeds for scheme, seeds in paired.items() if seeds}


def cell(values: Sequence[float], usual: int = 3, sign: str = "") -> str:
    """``91.45 ± 0.16``: mean and standard error; how many seeds, if they are fewer than usual; nothing for none.

    Args:
        values: one a seed.
        usual: the number of seeds that goes without saying.
        sign: ``"+"`` for differences.
    """
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    if len(values) > 1:
        mean += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
    seeds = "1 seed" if len(values) == 1 else f"{len(values)} seeds"
    return mean if len(values) >= usual else f"{mean} ({seeds})"


def in_order(schemes: Iterable[str]) -> list[str]:
    """``float`` first, then from many bits to few, weights before activations."""
    return sorted(set(schemes), key=lambda name: (name != FLOAT, *(-int(c) for c in name if c.isdigit())))


def table(title: str, rows: Sequence[tuple[str, Figures, str]], last: str = "", signed: Iterable[str] = ()) -> str:
    """A Markdown table with a column a scheme.

    Args:
        title: of the first column.
        rows: a name, its figures, and the text of the last column.
        last: title of the last column; without one there is none.
        signed: names of rows that are differences.
    """
    schemes = in_order(scheme for _, found, _ in rows for scheme in found)
    heads = [title, *schemes, *([last] if last else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, found, end in rows:
        sign = "+" if name in set(signed) else ""
        cells = [cell(list(found.get(scheme, {}).values()), sign=sign) for scheme in schemes]
        lines.append("| " + " | ".join([name, *cells, *([end] if last else [])]) + " |")
    return "\n".join(lines)


def grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain Markdown table; bars inside cells are escaped."""
    lines = [[*heads], ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
