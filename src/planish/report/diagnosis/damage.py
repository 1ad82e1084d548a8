"""What low bits change beyond top-1: single answers, confidence, classes, and the accuracy on spoiled images."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from planish.report.diagnosis.bars import Bars, ranked_chart
from planish.report.diagnosis.parts import (
    NAN,
    Networks,
    Picture,
    Section,
    Table,
    any_known,
    known,
    number,
    rows_file,
    show,
    show_percent,
)
from planish.report.diagnosis.plots import name_lines, plain_ticks
from planish.report.diagnosis.split import worst
from planish.report.svg import LIGHT, MARKERS, canvas, inline, label

Row = dict[str, Any]
Kinds = dict[str, dict[str, list[Row]]]  # by kind and network
DASHES = (0, (3, 2))


def section(networks: Networks) -> Section | None:
    """The chapter of damage; None if it was not measured."""
    if not networks.having("damage"):
        return None
    pictures = [p for p in (_classes(networks), _corruptions(networks)) if p]
    tables = [t for t in (_table(networks), _corruption_table(networks)) if t]
    if not pictures and not tables:
        return None
    intro = (
        f"What rounding to {networks.scheme} changes besides the number of right answers: how many answers are other "
        "than in float, how far confidence is from accuracy (ECE), which classes suffer, and what is left of the "
        "accuracy on spoiled images."
    )
    return Section("damage", "Damage beyond top-1", intro, [pictures], tables)


def _table(networks: Networks) -> Table | None:
    lines = []
    kinds = (
        ("flips", "answers that flip"),
        ("ece_float", "calibration error (ECE) in float"),
        ("ece_low_bit", f"ECE at {networks.scheme}"),
    )
    for key, words in kinds:
        values = [networks.number(n, "damage", key) for n in networks.names]
        if any_known(values):
            lines.append((words, *(show_percent(value, 2) for value in values)))
    return Table("Single answers and confidence.", ("", *networks.names), lines) if lines else None


def _classes(networks: Networks) -> Picture | None:
    rows = {n: networks.rows(n, "damage", "classes") for n in networks.having("damage", "classes")}
    change = {
        n: {str(r.get("name")): 100 * (number(r.get("low_bit")) - number(r.get("float"))) for r in found}
        for n, found in rows.items()
    }
    names = worst(change.values(), size=True)
    if not names:
        return None
    groups = [Bars(n, networks.colour(n), [values.get(c, NAN) for c in names]) for n, values in change.items()]
    title = "Change of accuracy by class" + (
        ", the largest" if len({c for v in change.values() for c in v}) > len(names) else ""
    )
    words = " ".join(
        f"{g.name}: {', '.join(f'{c} {show(v, 2)}' for c, v in list(zip(names, g.values, strict=True))[:5])}."
        for g in groups
    )
    fields = ("name", "images", "float", "low_bit")
    data = rows_file("classes", fields, rows)
    return Picture(
        title,
        ranked_chart("classes", f"{title}, in points. {words}", names, groups, "change of accuracy (points)"),
        data,
    )


def _kinds(networks: Networks) -> Kinds:
    """Rows of corruptions by kind and network, sorted by strength."""
    kinds: Kinds = {}
    for name in networks.having("damage", "corruptions"):
        for row in networks.rows(name, "damage", "corruptions"):
            if known(number(row.get("strength"))):
                kinds.setdefault(str(row.get("kind")), {}).setdefault(name, []).append(row)
    for by_name in kinds.values():
        for rows in by_name.values():
            rows.sort(key=lambda row: number(row.get("strength")))
    return kinds


def _corruptions(networks: Networks) -> Picture | None:
    kinds = _kinds(networks)
    if not kinds:
        return None
    title = "Accuracy on spoiled images"
    rows = {n: networks.rows(n, "damage", "corruptions") for n in networks.having("damage", "corruptions")}
    data = rows_file("corruptions", ("kind", "strength", "float", "low_bit"), rows)
    return Picture(title, _draw(f"{title}. {_corruption_words(networks, kinds)}", networks, kinds), data)


def _draw(alt: str, networks: Networks, kinds: Kinds) -> str:
    """One small chart a kind; what the network loses in float is dashed."""
    lines = -(-len(kinds) // 2)
    with canvas(400, 70 + 135 * lines, apart=True) as figure:
        grid = figure.subplots(lines, 2, squeeze=False, sharey=True).flatten()
        for axes, (kind, by_name) in zip(grid, kinds.items(), strict=False):
            for name, rows in by_name.items():
                x, index = [number(row.get("strength")) for row in rows], networks.colour(name)
                low_bit, in_float = ([100 * number(r.get(key)) for r in rows] for key in ("low_bit", "float"))
                axes.plot(x, low_bit, color=LIGHT[index], marker=MARKERS[index], markersize=4, linewidth=1.6)
                axes.plot(x, in_float, color=LIGHT[index], linewidth=1.2, linestyle=DASHES)
            axes.set_title(label(kind), loc="left", fontsize=11)
            plain_ticks(axes)
        for axes in grid[len(kinds) :]:
            axes.set_visible(False)
        figure.supxlabel("strength", fontsize=12)
        figure.supylabel("top-1 accuracy (%)", fontsize=12)
        styles: dict[str, dict[str, Any]] = {networks.scheme: {"linewidth": 1.6}}
        styles["float"] = {"linewidth": 1.2, "linestyle": DASHES}
        names = dict.fromkeys(name for by_name in kinds.values() for name in by_name)
        name_lines(figure, [(name, networks.colour(name)) for name in names], styles)
        return inline(figure, "corruptions-", alt)


def _mean(rows: list[Row], key: str) -> float:
    values = [v for row in rows if known(v := number(row.get(key)))]
    return fmean(values) if values else NAN


def _corruption_words(networks: Networks, kinds: Kinds) -> str:
    def words(name: str, rows: list[Row]) -> str:
        low_bit, in_float = (show_percent(_mean(rows, key)) for key in ("low_bit", "float"))
        return f"{name} {low_bit} at {networks.scheme} and {in_float} in float"

    parts = (f"{kind}: {', '.join(words(n, rows) for n, rows in by_name.items())}" for kind, by_name in kinds.items())
    return f"Means over strengths: {'; '.join(parts)}."


def _corruption_table(networks: Networks) -> Table | None:
    kinds = _kinds(networks)
    names = [n for n in networks.names if any(n in by_name for by_name in kinds.values())]
    if not names:
        return None
    header = ["corruption"]
    for name in names:
        header += [f"{name}, float", networks.scheme]
    lines = [
        [kind, *(show_percent(_mean(by_name.get(n, []), key)) for n in names for key in ("float", "low_bit"))]
        for kind, by_name in kinds.items()
    ]
    return Table("Top-1 on spoiled images, mean over strengths.", header, lines)
