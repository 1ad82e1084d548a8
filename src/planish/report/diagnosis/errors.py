"""What the rounding errors look like, site by site: their law, their size, and what they have to do with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median
from typing import Any

from planish.report.diagnosis.histograms import Site, picture, representative, verdict
from planish.report.diagnosis.parts import (
    DASH,
    Networks,
    Section,
    Table,
    known,
    number,
    rows_file,
    show,
    show_percent,
)
from planish.report.plain import join

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
    pictures = [picture(networks, name, rows, chosen) for name, rows in sites.items()]
    tables = [_summary(sites), _correlations(networks), _all(sites)]
    return Section(
        "errors", "The errors", intro, [[p for p in pictures if p]], [t for t in tables if t],
        [_verdicts(name, rows) for name, rows in sites.items()],
    )  # fmt: skip


def _verdicts(name: str, rows: list[Site]) -> str:
    counts = Counter(verdict(row) for row in rows)
    parts = [f"{count} {'is' if count == 1 else 'are'} {verdict}" for verdict, count in counts.most_common()]
    return f"{name}: of {len(rows)} {'site' if len(rows) == 1 else 'sites'} {join(parts)}."


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
            cells.append(f"{verdict(row) if row else DASH}{f' ({show(ratio)})' if known(ratio) else ''}")
        lines.append((site, str(first.get("bits") or DASH), *cells))
    data = rows_file("sites", FIELDS, sites)
    caption = f"All {len(rows)} sites: the verdict, and in brackets the variance in units of s\N{SUPERSCRIPT TWO}/12"
    return Table(caption, ("site", "bits", *sites), lines, data, folded=True)
