"""Representative sites of a network: the histogram of the error with the fitted Gaussian and the uniform law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from planish.report.diagnosis.bars import short_names
from planish.report.diagnosis.parts import (
    Data,
    Networks,
    Picture,
    any_known,
    csv_file,
    known,
    mapping,
    number,
    numbers,
    show,
)
from planish.report.diagnosis.plots import STEPS, tick
from planish.report.svg import LIGHT, TEXT, canvas, inline, label, legend

Site = dict[str, Any]
Curves = tuple[list[float], list[float], list[float], list[float]]
PANELS = 6


def verdict(row: Site) -> str:
    return str(row.get("verdict") or "without a verdict").replace("gaussian", "Gaussian")


def representative(rows: list[Site]) -> list[str]:
    """Up to six sites to show: of every kind (role and verdict), the commonest first, the one in the middle.

    In the middle: of those of its kind that have a histogram, by the distance from the Gaussian.
    """
    kinds: dict[tuple[str, str], list[Site]] = {}
    for row in rows:
        if _curves(row):
            kinds.setdefault((str(row.get("role")), str(row.get("verdict"))), []).append(row)
    queues = []
    for kind in sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind)):
        ordered = sorted(kinds[kind], key=lambda r: (number(r.get("distance_gaussian")) or 0.0, str(r.get("site"))))
        middle = len(ordered) // 2
        queues.append([ordered[middle], *ordered[middle + 1 :], *ordered[:middle][::-1]])
    chosen: list[str] = []
    while len(chosen) < PANELS and any(queues):
        chosen += [str(queue.pop(0).get("site")) for queue in queues if queue]
    chosen = chosen[:PANELS]
    return [str(row.get("site")) for row in rows if str(row.get("site")) in chosen]  # in the order of execution


def _curves(row: Site) -> Curves | None:
    """Bounds of the bins, measured density, and the two laws in each bin; None if there is no histogram."""
    found = mapping(row.get("histogram"))
    edges, density = numbers(found.get("edges")), numbers(found.get("density"))
    if len(edges) != len(density) + 1 or not any_known(density) or not all(map(known, edges)) or len(density) < 2:
        return None
    gaussian, uniform = (numbers(found.get(key)) for key in ("gaussian", "uniform"))
    return (
        edges,
        density,
        gaussian if len(gaussian) == len(density) else [],
        uniform if len(uniform) == len(density) else [],
    )


def picture(networks: Networks, name: str, rows: list[Site], chosen: list[str]) -> Picture | None:
    """The chosen sites of one network, each with the fitted Gaussian and the uniform law."""
    panels = [(row, curves) for row in rows if str(row.get("site")) in chosen and (curves := _curves(row))]
    if not panels:
        return None
    title = f"Errors of {name}"
    words = [
        f"{row.get('site')}: {verdict(row)}, variance {show(number(row.get('variance_ratio')))} of s squared / 12"
        for row, _ in panels
    ]
    key, colour = f"errors{networks.names.index(name)}", LIGHT[networks.colour(name)]
    svg = _draw(key, f"{title}. {'; '.join(words)}.", panels, colour)
    return Picture(title, svg, _histogram_data(name, panels))


def _draw(key: str, alt: str, panels: Sequence[tuple[Site, Curves]], colour: str) -> str:
    shown = short_names([str(row.get("site")) for row, _ in panels])
    lines = -(-len(panels) // 2)
    with canvas(400, 70 + 105 * lines, apart=True) as figure:
        grid = figure.subplots(lines, 2, squeeze=False).flatten()
        for axes, (row, curves) in zip(grid, panels, strict=False):
            _panel(axes, curves, colour)
            axes.set_title(shown[str(row.get("site"))], loc="left", fontsize=11, pad=14)
            axes.annotate(
                label(verdict(row)), (0, 1), xycoords="axes fraction", xytext=(0, 3),
                textcoords="offset points", fontsize=10,
            )  # fmt: skip
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("error (steps)", fontsize=12)
        _laws(figure, colour)
        titles = {short: site for site, short in shown.items() if short != site}
        return inline(figure, f"{key}-", alt, titles)


def _panel(axes: Any, curves: Curves, colour: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    edges, density, gaussian, uniform = curves
    axes.stairs(density, edges, fill=True, color=colour, alpha=0.45, linewidth=0)
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    if any_known(gaussian):
        axes.plot(centres, gaussian, color=TEXT, linewidth=1.3)
    if any_known(uniform):
        axes.stairs(uniform, edges, color=TEXT, linewidth=1.1, linestyle=(0, (3, 2)), baseline=None)
    axes.set_yticks([])
    axes.set_ylim(bottom=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(2, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.tick_params(labelsize=10)


def _laws(figure: Any, colour: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=colour, alpha=0.45, linewidth=0), Line2D([], [], color=TEXT, linewidth=1.3),
        Line2D([], [], color=TEXT, linewidth=1.1, linestyle=(0, (3, 2))),
    ]  # fmt: skip
    legend(figure, handles, ["measured", "fitted Gaussian", "uniform law"])


def _histogram_data(name: str, panels: list[tuple[Site, Any]]) -> Data:
    def lines() -> Iterator[tuple[Any, ...]]:
        for row, (edges, density, gaussian, uniform) in panels:
            for i, value in enumerate(density):
                laws = (curve[i] if curve else None for curve in (gaussian, uniform))
                yield (row.get("site"), edges[i], edges[i + 1], value, *laws)

    return csv_file(f"errors-{name}", ("site", "from", "to", "density", "gaussian", "uniform"), lines())
