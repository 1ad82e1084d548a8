"""Accuracy against bits, as inline SVG for the page and as PNG for elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.report.summary import Column, Summary, summarize
from planish.report.svg import LIGHT, MARKERS, canvas, colour_index, inline, label, legend, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """One chart: the method that it shows, the ``<svg>`` element, and the same in words."""

    method: str
    svg: str
    alt: str


def accuracy_charts(rows: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """One chart a method: x the schemes from most to fewest bits, y top-1 in percent, one line an arm.

    Error bars are standard errors over seeds. All charts share their axes. No chart if nothing was quantized.
    """
    summary = summarize(rows)
    charts = []
    measured = {column.method for _, column in summary.cells if not column.is_fp}
    for number, method in enumerate(m for m in summary.methods if m in measured):
        alt = describe(summary, method)
        with canvas() as figure:
            _draw(figure.subplots(), summary, method)
            _legend(figure, summary)
            charts.append(Chart(method, inline(figure, f"chart{number}-", alt), alt))
    return charts


def chart_png(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw all methods of ``results`` (results.json) side by side into a light PNG, 2 pixels a point."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    summary = summarize(results.get("rows", []))
    methods = summary.methods or ["none"]
    with mpl.rc_context(style("#1d2127", "#d5d8de")):
        figure = Figure(figsize=(400 / 72 * len(methods), 270 / 72), layout="constrained", facecolor="white")
        for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
            _draw(axes, summary, method)
            if len(methods) > 1:
                axes.set_title(label(method), loc="left")
        _legend(figure, summary)
        figure.savefig(path, format="png", dpi=144, metadata={"Software": None})
    return Path(path)


def describe(summary: Summary, method: str) -> str:
    """The chart in words, every value included."""
    columns = _columns(summary, method)
    sentences = []
    for arm in summary.arms:
        points = [f"{c.scheme} {cell.text()} %" for c in columns if (cell := summary.get(arm, c))]
        if points:
            sentences.append(f"{arm}: {', '.join(points)}.")
    return f"Top-1 accuracy against bits, method {method}. {' '.join(sentences)}"


def _columns(summary: Summary, method: str) -> list[Column]:
    return [column for column in summary.columns if column.is_fp or column.method == method]


def _draw(axes: Axes, summary: Summary, method: str) -> None:
    schemes = [s for s in summary.schemes if any(column.scheme == s for column in _columns(summary, method))]
    for number, arm in enumerate(summary.arms):
        points = {c.scheme: cell for c in _columns(summary, method) if (cell := summary.get(arm, c))}
        index = colour_index(arm, summary.arms)
        # Arms stand a little apart so that their error bars do not cover each other; a gap stays a gap.
        shift = 0.04 * (number - (len(summary.arms) - 1) / 2)
        nan = float("nan")
        axes.errorbar(
            [x + shift for x in range(len(schemes))],
            [100 * points[s].mean if s in points else nan for s in schemes],
            yerr=[100 * (points[s].error or 0) if s in points else nan for s in schemes],
            color=LIGHT[index],
            marker=MARKERS[index],
            markersize=5.5,
            linewidth=2.2 if arm == "flat" else 1.4,
            elinewidth=1.2,
            capsize=3,
            zorder=3 if arm == "flat" else 2,
            clip_on=False,
        )
    axes.set_xticks(range(len(schemes)), [label(scheme) for scheme in schemes])
    axes.set_xlim(-0.3, len(schemes) - 0.7)
    axes.set_ylim(*_limits(summary))
    axes.set_ylabel("top-1 accuracy (%)")


def _limits(summary: Summary) -> tuple[float, float]:
    ends = [100 * (cell.mean + sign * (cell.error or 0)) for cell in summary.cells.values() for sign in (-1, 1)]
    low, high = min(ends, default=0), max(ends, default=100)
    pad = max(0.06 * (high - low), 0.5)
    return max(0.0, low - pad), min(100.0, high + pad)


def _legend(figure: Figure, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    arms = [arm for arm in summary.arms if any(name == arm for name, _ in summary.cells)]
    handles = []
    for arm in arms:
        index = colour_index(arm, summary.arms)
        width = 2.2 if arm == "flat" else 1.4
        handles.append(Line2D([], [], color=LIGHT[index], marker=MARKERS[index], markersize=5.5, linewidth=width))
    legend(figure, handles, arms)
