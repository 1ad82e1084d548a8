"""Accuracy against bits, as inline SVG for the page and as PNG for elsewhere.

The SVG keeps its text as text, takes the colours from the page around it (``currentColor`` and the CSS variables
``--arm-0`` ..., with a fallback for each) and refers to nothing outside. The same rows give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planish.report.summary import ARMS, Column, Summary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with any colour vision by hue, lightness and marker; at least 3:1 against the page in either theme.
LIGHT = ("#5f6673", "#a5478a", "#0072b2", "#00805c", "#c84f00", "#806000", "#3f51b5", "#8c3b3b")
DARK = ("#a3aab8", "#e08cc4", "#56b4e9", "#2fbf95", "#ff8546", "#e0b400", "#9fa8ff", "#e39a9a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# Stand-ins that matplotlib writes and that are replaced by what CSS decides.
_TEXT, _LINE = "#010203", "#040506"
_TEXTS = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
_LINES = ("axes.edgecolor", "grid.color")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "planish",
    "font.size": 12,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.usetex": False,
}


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
    import matplotlib as mpl
    from matplotlib.figure import Figure

    summary = summarize(rows)
    charts = []
    measured = {column.method for _, column in summary.cells if not column.is_fp}
    for number, method in enumerate(m for m in summary.methods if m in measured):
        alt = describe(summary, method)
        with mpl.rc_context(_style(_TEXT, _LINE)):
            figure = Figure(figsize=(400 / 72, 270 / 72), layout="constrained")
            _draw(figure.subplots(), summary, method, LIGHT)
            _legend(figure, summary)
            charts.append(Chart(method, _inline(_svg(figure), f"chart{number}-", alt), alt))
    return charts


def chart_png(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draw all methods of ``results`` (results.json) side by side into a light PNG, 2 pixels a point."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    summary = summarize(results.get("rows", []))
    methods = summary.methods or ["none"]
    with mpl.rc_context(_style("#1d2127", "#d5d8de")):
        figure = Figure(figsize=(400 / 72 * len(methods), 270 / 72), layout="constrained", facecolor="white")
        for axes, method in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods, strict=True):
            _draw(axes, summary, method, LIGHT)
            if len(methods) > 1:
                axes.set_title(_label(method), loc="left", fontsize=12, parse_math=False)
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


def colour_index(arm: str, arms: list[str]) -> int:
    """Which colour and marker an arm has: the usual arms always the same, others in turn."""
    if arm in ARMS:
        return ARMS.index(arm)
    others = [name for name in arms if name not in ARMS]
    return len(ARMS) + others.index(arm) % (len(LIGHT) - len(ARMS))


def _columns(summary: Summary, method: str) -> list[Column]:
    return [column for column in summary.columns if column.is_fp or column.method == method]


def _draw(axes: Axes, summary: Summary, method: str, colours: tuple[str, ...]) -> None:
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
            color=colours[index],
            marker=MARKERS[index],
            markersize=5.5,
            linewidth=2.2 if arm == "flat" else 1.4,
            elinewidth=1.2,
            capsize=3,
            zorder=3 if arm == "flat" else 2,
            clip_on=False,
        )
    axes.set_xticks(range(len(schemes)), [_label(scheme) for scheme in schemes])
    axes.set_xlim(-0.3, len(schemes) - 0.7)
    axes.set_ylim(*_limits(summary))
    axes.set_ylabel("top-1 accuracy (%)")
    for text in axes.get_xticklabels():
        text.set_parse_math(False)


def _limits(summary: Summary) -> tuple[float, float]:
    ends = [100 * (cell.mean + sign * (cell.error or 0)) for cell in summary.cells.values() for sign in (-1, 1)]
    low, high = min(ends, default=0), max(ends, default=100)
    pad = max(0.06 * (high - low), 0.5)
    return max(0.0, low - pad), min(100.0, high + pad)


def _legend(figure: Figure, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    arms = [arm for arm in summary.arms if any(name == arm for name, _ in summary.cells)]
    if not arms:
        return
    handles = []
    for arm in arms:
        index = colour_index(arm, summary.arms)
        width = 2.2 if arm == "flat" else 1.4
        handles.append(Line2D([], [], color=LIGHT[index], marker=MARKERS[index], markersize=5.5, linewidth=width))
    labels = [_label(arm) for arm in arms]
    per_row = max(1, min(len(arms), 52 // (max(map(len, labels)) + 5)))
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=per_row,
        frameon=False,
        columnspacing=1.1,
        handlelength=1.6,
        handletextpad=0.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label(name: str) -> str:
    """A user's name as a label: printable, of bounded length, and not hidden by matplotlib's leading underscore."""
    text = "".join(char if char.isprintable() else "?" for char in name)
    text = text if len(text) <= 24 else text[:23] + "\N{HORIZONTAL ELLIPSIS}"
    return "\N{ZERO WIDTH SPACE}" + text if text.startswith("_") else text


def _style(text: str, line: str) -> Any:
    """All of matplotlib's settings, so that a user's own style file does not change a report."""
    import matplotlib as mpl

    style: dict[str, Any] = dict(mpl.rcParamsDefault.items())
    style.pop("backend", None)  # the figures name their format; the user's choice of windows stays
    style.update(_STYLE, **dict.fromkeys(_TEXTS, text), **dict.fromkeys(_LINES, line))
    return style


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _inline(svg: str, prefix: str, alt: str) -> str:
    """Make matplotlib's SVG file an element of a page: no prologue, ids of its own, colours from CSS, words for it."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{escape(alt)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the family comes from the page
    svg = svg.replace(_TEXT, "currentColor").replace(_LINE, f"var(--line, {_LINE})")
    for index, colour in enumerate(LIGHT):
        svg = svg.replace(colour, f"var(--arm-{index}, {colour})")
    return re.sub(r"\n\s*\n+", "\n", svg)
