"""CSV files that list images: the columns ``path``, ``label`` and, where the splits are given, ``split``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from planish.data.listing import TEST_NAMES, Found
from planish.data.rows import TRAIN_NAMES, Labelled, arrange, read_classes
from planish.errors import PlanishError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SPLITS = (*TRAIN_NAMES, *TEST_NAMES)
_EXPECTED = "expected a first line with the columns path, label and, where the splits are given, split"


def find_manifests(folder: Path) -> list[Path]:
    """``train.csv`` and ``val.csv`` of a folder (or validation, valid, test; or .tsv); none without the first."""
    present = {path.name.lower(): path for path in sorted(folder.iterdir(), reverse=True) if path.is_file()}
    for ending in DELIMITERS:
        train = present.get(f"train{ending}")
        test = next((present[name + ending] for name in TEST_NAMES if name + ending in present), None)
        if train is not None:
            return [train] if test is None else [train, test]
    return []


def find_listed(path: Path) -> Found:
    """The images that a file lists, or the ``train.csv`` and ``val.csv`` of a folder.

    Paths are relative to the file's folder. Within a class, images are in the order of their paths, so that the order
    of the lines changes nothing. Names of classes for integer labels may stand in ``classes.txt`` beside the file.

    Raises:
        PlanishError: for a file that is missing, is no such table, or lists the same path under two labels.
    """
    if path.is_dir():
        files = find_manifests(path)
        rows = [row for file, split in zip(files, ("train", "val"), strict=False) for row in _read(file, split)]
        if len(files) == 1:
            rows = [Labelled(row.sample, row.label) for row in rows]
        return arrange(path.resolve().name, path, _ordered(path, rows), read_classes(path))
    if not path.is_file():
        raise PlanishError(f"the file {path} does not exist: {_EXPECTED}")
    return arrange(path.stem, path, _ordered(path, list(_read(path, None))), read_classes(path.parent))


def _read(path: Path, split: str | None) -> Iterator[Labelled]:
    """The lines of one file. ``split`` is that of the whole file; ``None``: the column says it, if there is one."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
            columns = _columns(path, next(table, []), split)
            for cells in table:
                if any(cell.strip() for cell in cells):
                    yield _line(path, table.line_num, cells, columns, split)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanishError(f"{path} cannot be read as a table in UTF-8: {error}") from error


def _columns(path: Path, header: list[str], split: str | None) -> dict[str, int]:
    """Where each column stands."""
    names = [cell.strip().lower() for cell in header]
    if missing := [name for name in ("path", "label") if name not in names]:
        shown = ", ".join(repr(cell) for cell in header[:6]) or "nothing"
        raise PlanishError(f"{path} has no column {' and no column '.join(missing)}: {_EXPECTED}; it begins {shown}")
    wanted = ("path", "label") if split is not None else ("path", "label", "split")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise PlanishError(f"{path} has the column {twice[0]} twice: {_EXPECTED}")
    return {name: names.index(name) for name in wanted if name in names}


def _line(path: Path, number: int, cells: list[str], columns: dict[str, int], split: str | None) -> Labelled:
    values = {name: cells[place].strip() if place < len(cells) else "" for name, place in columns.items()}
    if empty := [name for name, value in values.items() if not value]:
        raise PlanishError(f"{path}, line {number}: the {empty[0]} is missing: every line needs {', '.join(columns)}")
    if broken := [name for name, value in values.items() if "\n" in value or "\r" in value]:
        raise PlanishError(f"{path}, line {number}: the {broken[0]} goes over several lines: is a quote not closed?")
    given = values.get("split", "").lower()
    if given and given not in _SPLITS:
        raise PlanishError(
            f"{path}, line {number}: the split is {values['split']!r}, expected one of {', '.join(_SPLITS)}"
        )
    return Labelled(path.parent / values["path"], values["label"], split or given or None)


def _ordered(where: Path, rows: list[Labelled]) -> list[Labelled]:
    """In the order in which folders list them; raises for a path with two labels."""
    labels: dict[object, str] = {}
    for row in rows:
        if (other := labels.setdefault(row.sample, row.label)) != row.label:
            raise PlanishError(
                f"{where}: {row.sample} is listed with the labels {other!r} and {row.label!r}: an image has one label"
            )
    return sorted(rows, key=_walked)


def _walked(row: Labelled) -> list[tuple[bool, str]]:
    """Sorts as folders are listed: in each folder first its files, then its folders."""
    *folders, name = Path(str(row.sample)).parts
    return [*((True, folder) for folder in folders), (False, name)]
