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
