"""Line charts of a diagnosis: all networks in one, with bands for standard errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.report.diagnosis.parts import MINUS, NAN, Networks, any_known, known, number, show
from planish.report.svg import LIGHT, MARKERS, TEXT, canvas, inline, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STEPS = (1, 2, 2.5, 5, 10)  # of the ticks, times a power of ten


@dataclass(frozen=True)
class Line:
    """One network in a line chart; ``low`` and ``high`` bound a band."""

    name: str
    colour: int
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def line_of(networks: Networks, name: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float = 1) -> Line:
    """A line from a list of dicts, sorted by ``x``; an ``error`` beside the loss becomes a band."""
    points = sorted(
        (number(row.get(x)), scale * number(row.get(y)), number(row.get("error")) if y == "loss" else NAN)
        for row in rows
        if known(number(row.get(x)))
    )
    xs, ys, errors = ([point[i] for point in points] for i in range(3))
    low = [v - e for v, e in zip(ys, errors, strict=True)]
    high = [v + e for v, e in zip(ys, errors, strict=True)]
    return Line(name, networks.colour(name), xs, ys, *((low, high) if any_known(errors) else ([], [])))


def line_chart(
    key: str, alt: str, lines: Sequence[Line], xlabel: str, ylabel: str, *, marks: Mapping[float, str] | None = None
) -> str:
    """All lines in one chart. ``marks``: places on the x axis that get a vertical line with a word at it."""
    with canvas() as figure:
        axes = figure.subplots()
        for line in lines:
            colour, every = LIGHT[line.colour], max(1, len(line.x) // 8)
            every = every if len(line.x) < 60 else len(line.x)  # a curve of many points needs no markers
            marker = MARKERS[line.colour]
            axes.plot(
                line.x, line.y, color=colour, linewidth=1.8, zorder=3, marker=marker, markersize=4.5, markevery=every
            )
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        scale_y(axes, [value for line in lines for value in line.y])
        for place, word in (marks or {}).items():
            axes.axvline(place, color=TEXT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate(
                word, (place, 1), xycoords=("data", "axes fraction"), xytext=(4, -2), textcoords="offset points",
                va="top", fontsize=11,
            )  # fmt: skip
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        plain_ticks(axes)
        name_lines(figure, [(line.name, line.colour) for line in lines])
        return inline(figure, f"{key}-", alt)


def scale_y(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values are positive and range over more than a factor of 30."""
    finite = [value for value in values if known(value)]
    if finite and min(finite) > 0 and max(finite) > 30 * min(finite):
        axes.set_yscale("log")
        axes.set_ylim(min(finite) / 1.3, max(finite) * 1.3)


def plain_ticks(axes: Axes, x: bool = True, y: bool = True) -> None:
    """Tick labels as plain text, few enough for a phone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for axis, wanted, scale, most in ((axes.xaxis, x, axes.get_xscale(), 6), (axes.yaxis, y, axes.get_yscale(), 6)):
        if not wanted:
            continue
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axis.set_minor_formatter(NullFormatter())
        if scale == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=most + 1))
        else:
            axis.set_major_locator(MaxNLocator(most - 1, min_n_ticks=2, steps=STEPS))


def tick(value: float) -> str:
    """A number at an axis, as short as it can be."""
    if value and not 1e-3 <= abs(value) < 1e5:
        text = f"{value:.0e}" if f"{value:.0e}" == f"{value:.1e}".replace(".0e", "e") else f"{value:.1e}"
        text = re.sub(r"e([+-])0*", lambda e: "e" + e[1].strip("+"), text)
    else:
        text = f"{value:.6g}"
    return text.replace("-", MINUS)


def name_lines(
    figure: Figure, names: Sequence[tuple[str, int]], others: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """The legend of networks, if there are several, and of whatever else is drawn."""
    from matplotlib.lines import Line2D

    handles: dict[str, Line2D] = {}
    if len(names) > 1:
        for name, colour in names:
            handles[name] = Line2D([], [], color=LIGHT[colour], marker=MARKERS[colour], markersize=5, linewidth=1.8)
    for name, looks in (others or {}).items():
        handles[name] = Line2D([], [], **{"color": TEXT, "linewidth": 1.4, **looks})
    legend(figure, list(handles.values()), list(handles))


def in_words(line: Line, unit: str = "", most: int = 5) -> str:
    """``given: 0.31 at 0, 0.42 at 1.``: a line in a few of its points."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if known(y)]
    step = max(1, -(-(len(points) - 1) // (most - 1)))
    chosen = [*points[:-1:step], *points[-1:]]
    return f"{line.name}: {', '.join(f'{show(y)}{unit} at {show(x)}' for x, y in chosen)}."
