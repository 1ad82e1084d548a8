"""What a section of the page is made of, and a careful way into the dicts of a diagnosis."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from planish.report.plain import to_plain
from planish.report.svg import colour_index

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
NAN = float("nan")


@dataclass(frozen=True)
class Data:
    """Numbers behind a picture or a table, as a file to take away."""

    name: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A chart: its title, the ``<svg>`` element (which holds the same in words), its numbers."""

    title: str
    svg: str
    data: Data | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names its rows. ``folded``: shown only when asked for."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Data | None = None
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One answer to "why": a title, a sentence or two, then groups of pictures, and tables."""

    key: str
    title: str
    intro: str
    pictures: list[list[Picture]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Networks:
    """The networks of ``results["flatness"]``. Whatever is missing or misshapen there reads as empty."""

    flatness: Mapping[str, Any]

    @classmethod
    def of(cls, flatness: Any) -> Networks:
        """From what is in results.json, or from the same with NaN in it."""
        return cls(mapping(to_plain(flatness)))

    @cached_property
    def names(self) -> list[str]:
        return [name for name, values in mapping(self.flatness.get("networks")).items() if mapping(values)]

    @property
    def scheme(self) -> str:
        return str(self.flatness.get("scheme") or "low bits")

    def colour(self, name: str) -> int:
        return colour_index(name, self.names)

    def mapping(self, name: str, *path: str) -> dict[str, Any]:
        """The dict at ``path`` in the network ``name``."""
        value: Any = self.flatness["networks"][name]
        for key in path:
            value = mapping(value).get(key)
        return mapping(value)

    def rows(self, name: str, *path: str) -> list[dict[str, Any]]:
        """The list of dicts at ``path``."""
        found = self.mapping(name, *path[:-1]).get(path[-1])
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    def number(self, name: str, *path: str) -> float:
        """The number at ``path``; NaN if there is none."""
        return number(self.mapping(name, *path[:-1]).get(path[-1]))

    def having(self, *path: str) -> list[str]:
        """The networks that hold something at ``path``."""
        return [name for name in self.names if self.mapping(name, *path[:-1]).get(path[-1]) not in (None, [], {})]


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """A finite number as a float, anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return NAN
    return float(value)


def numbers(value: Any) -> list[float]:
    return [number(item) for item in value] if isinstance(value, list) else []


def known(value: float) -> bool:
    return not math.isnan(value)


def any_known(values: Iterable[float]) -> bool:
    return any(map(known, values))


def show(value: float, digits: int = 3) -> str:
    """A number as a reader wants to see it: three significant digits, a dash for none."""
    if not known(value):
        return DASH
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if -3 <= size < 6:
        text = f"{value:.{max(0, digits - 1 - size)}f}"
    else:
        text = f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return text.replace("-", MINUS)


def show_percent(value: float, digits: int = 1) -> str:
    """0.861 as ``86.1 %``."""
    return f"{100 * value:.{digits}f} %".replace("-", MINUS) if known(value) else DASH


def with_error(value: float, error: float) -> str:
    """Both to the second digit of the error: ``812 ± 31``."""
    if not (known(value) and known(error) and error > 0):
        return show(value)
    digits = 1 - math.floor(math.log10(error))
    if digits > 6 or abs(value) >= 1e6:
        return f"{show(value)} \N{PLUS-MINUS SIGN} {show(error, 2)}"
    value, error = round(value, digits), round(error, digits)
    return f"{value:.{max(digits, 0)}f} \N{PLUS-MINUS SIGN} {error:.{max(digits, 0)}f}".replace("-", MINUS)


def rows_file(name: str, fields: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Data:
    """A list of dicts for each network as one CSV: these fields first, then whatever else is no list or dict."""
    every = [row for found in rows.values() for row in found]
    others = dict.fromkeys(
        k for row in every for k, v in row.items() if k not in fields and not isinstance(v, (list, dict))
    )
    keys = [*fields, *others]
    lines = [(network, *(row.get(key) for key in keys)) for network, found in rows.items() for row in found]
    return csv_file(name, ("network", *keys), lines)


def csv_file(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Data:
    """A CSV with a header; six significant digits, empty where there is no number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[_cell(value) for value in row] for row in rows])
    return Data(f"{name}.csv", file.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if known(value) else ""
    return "" if value is None else value
