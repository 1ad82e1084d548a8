"""What the scripts beside this one share."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of rows that have the same columns; what was there is replaced."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


Key = tuple[str, ...]


def continue_rows(
    path: Path,
    fields: Sequence[str],
    key: Callable[[Mapping[str, str]], Key],
    measure: Callable[[set[Key]], Iterable[Mapping[str, Any]]],
    shown: Sequence[str],
) -> None:
    """Add to a CSV file what is not in it yet, row by row as it is measured; begins the file if there is none.

    ``measure`` is given the keys of the rows that are there; of every new row the columns ``shown`` are printed.
    """
    done: set[Key] = set()
    if path.exists():
        with path.open() as file:
            done = {key(row) for row in csv.DictReader(file)}
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for row in measure(done):
            writer.writerow(row)
            file.flush()
            print({name: row.get(name) for name in shown}, flush=True)


def mean_and_error(values: Sequence[float]) -> str:
    """The mean and, of several values, its standard error; nothing of none."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{error}"


def scheme_table(
    title: str,
    schemes: Sequence[str],
    names: Iterable[str],
    values: Callable[[str, str], Sequence[float]],
    seconds: Callable[[str], Sequence[float]] | None = None,
) -> list[str]:
    """The lines of a Markdown table, and an empty one: a row for each name, a column for each scheme.

    A cell is the mean of ``values(name, scheme)`` with its error; the last column the median of ``seconds(name)``.
    """
    heads = [title, *schemes, *(["seconds"] if seconds else [])]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for name in names:
        last = [f"{statistics.median(seconds(name)):.0f}"] if seconds else []
        lines.append(_line([name, *(mean_and_error(values(name, scheme)) for scheme in schemes), *last]))
    return [*lines, ""]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
