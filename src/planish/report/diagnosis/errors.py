"""What the rounding errors look like, site by site: their law, their size, and what they have to do with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

from planish.report.diagnosis.bars import short_names
from planish.report.diagnosis.parts import (
    DASH,
    Data,
    Networks,
    Picture,
    Section,
    Table,
    any_known,
    csv_file,
    known,
    mapping,
    number,
    numbers,
    rows_file,
    show,
    show_percent,
)
from planish.report.diagnosis.plots import STEPS, tick
from planish.report.plain import join
from planish.report.svg import LIGHT, TEXT, canvas, inline, label, legend

Site = dict[str, Any]
PANELS = 6
FIELDS = ("site", "role", "bits", "count", "mean", "variance", "step", "variance_ratio", "clipped", "zeros",
          "kurtosis", "distance_gaussian", "distance_uniform", "verdict")  # fmt: skip


def section(networks: Networks) -> Section | None:
    """The chapter of errors; None if no site was looked at."""
    sites = {name: networks.rows(name, "errors", "sites") for name in networks.having("errors", "sites")}
    sites = {name: rows for name, rows in sites.items() if rows}
    if not sites:
        return None
    intro = (
        "What rounding adds to a tensor, at every place where one enters a matrix product. Where a tensor varies over "
        "many steps s of its grid, the error is uniform, of variance s\N{SUPERSCRIPT TWO}/12; where it is cut off at "
        "the ends of the grid, or has few values, it is not."
    )
    chosen = representative(next(iter(sites.values())))
    pictures = [_histograms(networks, name, rows, chosen) for name, rows in sites.items()]
    tables = [_summary(sites), _correlations(networks), _all(sites)]
    return Section(
        "errors", "The errors", intro, [[p for p in pictures if p]], [t for t in tables if t],
        [_verdicts(name, rows) for name, rows in sites.items()],
    )  # fmt: skip


def _verdict(row: Site) -> str:
    return str(row.get("verdict") or "without a verdict").replace("gaussian", "Gaussian")


def _verdicts(name: str, rows: list[Site]) -> str:
    counts = Counter(_verdict(row) for row in rows)
    parts = [f"{count} {'is' if count == 1 else 'are'} {verdict}" for verdict, count in counts.most_common()]
    return f"{name}: of {len(rows)} {'site' if len(rows) == 1 else 'sites'} {join(parts)}."


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


def _curves(row: Site) -> tuple[list[float], list[float], list[float], list[float]] | None:
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


def _histograms(networks: Networks, name: str, rows: list[Site], chosen: list[str]) -> Picture | None:
    """The chosen sites of one network, each with the fitted Gaussian and the uniform law."""
    panels = [(row, curves) for row in rows if str(row.get("site")) in chosen and (curves := _curves(row))]
    if not panels:
        return None
    title = f"Errors of {name}"
    words = [
        f"{row.get('site')}: {_verdict(row)}, variance {show(number(row.get('variance_ratio')))} of s squared / 12"
        for row, _ in panels
    ]
    shown = short_names([str(row.get("site")) for row, _ in panels])
    lines = -(-len(panels) // 2)
    with canvas(400, 70 + 105 * lines, apart=True) as figure:
        grid = figure.subplots(lines, 2, squeeze=False).flatten()
        for axes, (row, curves) in zip(grid, panels, strict=False):
            _panel(axes, curves, LIGHT[networks.colour(name)])
            axes.set_title(shown[str(row.get("site"))], loc="left", fontsize=11, pad=14)
            axes.annotate(
                label(_verdict(row)), (0, 1), xycoords="axes fraction", xytext=(0, 3),
                textcoords="offset points", fontsize=10,
            )  # fmt: skip
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("error (steps)", fontsize=12)
        _laws(figure, LIGHT[networks.colour(name)])
        titles = {short: site for site, short in shown.items() if short != site}
        svg = inline(figure, f"errors{networks.names.index(name)}-", f"{title}. {'; '.join(words)}.", titles)
    return Picture(title, svg, _histogram_data(name, panels))


def _panel(axes: Any, curves: tuple[list[float], list[float], list[float], list[float]], colour: str) -> None:
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


def _summary(sites: dict[str, list[Site]]) -> Table:
    """A few numbers of all sites of each network."""

    def middle(rows: list[Site], weights: bool) -> str:
        ratios = [number(row.get("variance_ratio")) for row in rows if (row.get("role") == "weight") is weights]
        ratios = [ratio for ratio in ratios if known(ratio)]
        return show(median(ratios)) if ratios else DASH

    def most(rows: list[Site], key: str) -> str:
        return show_percent(max((v for row in rows if known(v := number(row.get(key)))), default=float("nan")))

    lines = [
        (
            "variance of weight errors, of s\N{SUPERSCRIPT TWO}/12 (median)",
            *(middle(rows, True) for rows in sites.values()),
        ),
        (
            "variance of activation errors, of s\N{SUPERSCRIPT TWO}/12 (median)",
            *(middle(rows, False) for rows in sites.values()),
        ),
        ("most values beyond the grid at a site", *(most(rows, "clipped") for rows in sites.values())),
        ("most values that are exactly zero at a site", *(most(rows, "zeros") for rows in sites.values())),
    ]
    return Table("The errors of all sites in a few numbers.", ("", *sites), lines)


def _correlations(networks: Networks) -> Table | None:
    found = {name: dict(_pairs(networks.mapping(name, "errors", "correlations"))) for name in networks.names}
    kinds = dict.fromkeys(kind for values in found.values() for kind in values)
    names = [name for name, values in found.items() if values]
    if not kinds:
        return None
    lines = []
    for kind in kinds:
        cells = []
        for name in names:
            value, chance = found[name].get(kind, (float("nan"), float("nan")))
            cells.append(f"{show(value)} ({show(chance)})" if known(chance) else show(value))
        lines.append((kind, *cells))
    return Table("Correlation between errors, and in brackets what chance alone gives.", ("between", *names), lines)


_KINDS = {
    "weight_activation": "weights and activations of a product",
    "channels": "channels of a site",
    "layers": "layers",
}


def _pairs(found: dict[str, Any], before: str = "") -> Iterator[tuple[str, tuple[float, float]]]:
    """All ``{"value": ..., "chance": ...}`` in there, however deep, with words for where they are."""
    for key, value in found.items():
        if isinstance(value, dict):
            words = f"{before}{_KINDS.get(key, key.replace('_', ' '))}"
            if "value" in value:
                yield words, (number(value["value"]), number(value.get("chance")))
            yield from _pairs(value, f"{words}, ")


def _all(sites: dict[str, list[Site]]) -> Table:
    """Every site with its verdict."""
    rows: dict[str, dict[str, Site]] = {}
    for name, found in sites.items():
        for row in found:
            rows.setdefault(str(row.get("site")), {})[name] = row
    lines = []
    for site, by_name in rows.items():
        first = next(iter(by_name.values()))
        cells = []
        for name in sites:
            row = by_name.get(name, {})
            ratio = number(row.get("variance_ratio"))
            cells.append(f"{_verdict(row) if row else DASH}{f' ({show(ratio)})' if known(ratio) else ''}")
        lines.append((site, str(first.get("bits") or DASH), *cells))
    data = rows_file("sites", FIELDS, sites)
    caption = f"All {len(rows)} sites: the verdict, and in brackets the variance in units of s\N{SUPERSCRIPT TWO}/12"
    return Table(caption, ("site", "bits", *sites), lines, data, folded=True)
