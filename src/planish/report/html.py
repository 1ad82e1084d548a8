"""The run as one HTML page: no network, no script, light and dark, at home on a phone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from planish.report.charts import accuracy_charts
from planish.report.diagnosis import Story, Table, tell
from planish.report.files import write_text
from planish.report.plain import as_text, flatten_keys, to_plain
from planish.report.summary import Summary, outcome, summarize
from planish.report.svg import DARK, HEAT_DARK, HEAT_LIGHT, LIGHT
from planish.report.table import caption

ROW_FIELDS = (
    "arm",
    "scheme",
    "method",
    "seed",
    "fp_top1",
    "top1",
    "nll",
    "ece",
    "flip_rate",
    "seconds",
    "peak_memory_mb",
    "weights_mb",
)


def write_report(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write ``results`` (results.json) as one self-contained page to ``path``, and return the path."""
    path = Path(path)
    write_text(path, render_report(results))
    return path


def render_report(results: Mapping[str, Any]) -> str:
    """The page as text. Everything is escaped; a number that was not measured is a dash. Same results, same text."""
    from jinja2 import Environment, PackageLoader

    rows = list(results.get("rows") or [])
    summary = summarize(rows)
    protocol = results.get("protocol") or {}
    comparison = results.get("comparison") or {}
    why = tell(results.get("flatness") or {})
    loader = PackageLoader("planish.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters["data_uri"] = data_uri
    return environment.get_template("report.html.j2").render(
        title=_title(protocol, comparison),
        outcome=_outcome(summary, why, comparison),
        protocol=_entries(protocol),
        environment=_entries(results.get("environment") or {}),
        summary=summary,
        caption=caption(summary),
        gaps=len(summary.cells) < len(summary.arms) * len(summary.columns),
        charts=accuracy_charts(rows),
        light=LIGHT,
        dark=DARK,
        comparison=_differences(comparison),
        notes=comparison.get("notes") or [],
        heat_light=HEAT_LIGHT,
        heat_dark=HEAT_DARK,
        why=why,
        csv=data_uri(rows_csv(rows)),
        rows=len(rows),
        ledger=[_ledger_line(row) for row in results.get("ledger") or []],
    )


def rows_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as CSV with a header; the fields of design first, then any others; empty where not measured."""
    rows = [to_plain(row) for row in rows]
    extra = dict.fromkeys(key for row in rows for key in row if key not in ROW_FIELDS)
    file = io.StringIO()
    writer = csv.DictWriter(file, [*ROW_FIELDS, *extra], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _outcome(summary: Summary, why: Story, comparison: Mapping[str, Any]) -> str:
    """The result in a sentence, and what has to be known with it."""
    if why.outcome and not summary.cells:
        return why.outcome
    return " ".join(filter(None, [outcome(summary), as_text(comparison.get("caution"))]))


def _title(protocol: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    if comparison:
        return f"planish: {len(comparison['runs'])} runs compared"
    model = as_text(protocol.get("model"))
    data = as_text(protocol.get("data") or protocol.get("dataset"))
    parts = [f"planish: {model}" if model else "planish", f"on {data}" if data else ""]
    return " ".join(filter(None, parts))


def _entries(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), as_text(value) or "\N{EN DASH}") for key, value in flatten_keys(values).items()]


def _differences(comparison: Mapping[str, Any]) -> list[Table]:
    """The settings in which compared runs differ, one column a run."""
    found = comparison.get("differences") or {}
    if not found:
        return []
    rows = [(key.replace("_", " "), *(text or "\N{EN DASH}" for text in texts)) for key, texts in found.items()]
    return [Table("What differs between the runs.", ("setting", *comparison["runs"]), rows)]


def _ledger_line(row: Mapping[str, Any]) -> list[str]:
    share = row.get("share")
    shown = f"{100 * share:.2f} %" if isinstance(share, (int, float)) else as_text(share)
    return [as_text(row.get(key)) for key in ("site", "operator", "bits", "granularity")] + [shown]


def data_uri(text: str) -> str:
    """A CSV as a link that holds it."""
    return "data:text/csv;charset=utf-8," + quote(text, safe=",:;/()@!*~", errors="backslashreplace")
