"""What the landscape foretells for other bits, beside what was measured."""

from __future__ import annotations

from typing import Any

from planish.report.diagnosis.parts import (
    DASH,
    Data,
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
from planish.report.summary import bits_key
from planish.report.svg import LIGHT, MARKERS, PAGE, canvas, inline, label

Row = dict[str, Any]
FIELDS = ("scheme", "loss", "top1", "low", "high", "measured_top1")


def section(networks: Networks) -> Section | None:
    """The chapter of predictions; None if there is none."""
    rows = {n: {str(r.get("scheme")): r for r in networks.rows(n, "prediction")} for n in networks.having("prediction")}
    schemes = sorted({scheme for found in rows.values() for scheme in found}, key=bits_key)
    if not schemes:
        return None
    intro = (
        "What top-1 should be at other bits, told from the float network alone, and what it was where it was measured."
    )
    if gaps := _gaps(rows):
        mean, most = 100 * sum(gaps) / len(gaps), 100 * max(gaps)
        intro += f" Predictions are off by {mean:.1f} points on average, by {most:.1f} at most."
    data = rows_file("prediction", FIELDS, {name: list(found.values()) for name, found in rows.items()})
    picture = _chart(networks, rows, schemes, data)
    table = _table(rows, schemes, None if picture else data)
    return Section("prediction", "Predicted and measured", intro, [[picture]] if picture else [], [table])


def _gaps(rows: dict[str, dict[str, Row]]) -> list[float]:
    pairs = [(number(r.get("top1")), number(r.get("measured_top1"))) for found in rows.values() for r in found.values()]
    return [gap for a, b in pairs if known(gap := abs(a - b))]


def _table(rows: dict[str, dict[str, Row]], schemes: list[str], data: Data | None) -> Table:
    header, lines = ["scheme"], []
    for name in rows:
        header += [f"{name}, predicted", "measured"]
    for scheme in schemes:
        line = [scheme]
        for found in rows.values():
            row = found.get(scheme, {})
            line += [_predicted(row), show_percent(number(row.get("measured_top1")))]
        lines.append(line)
    return Table("Top-1 as predicted, with its error bar, and as measured.", header, lines, data)


def _predicted(row: Row) -> str:
    top1, low, high, loss = (number(row.get(key)) for key in ("top1", "low", "high", "loss"))
    if known(top1) and known(low) and known(high):
        return f"{show_percent(top1)} ({100 * low:.1f} to {100 * high:.1f})"
    if known(top1):
        return show_percent(top1)
    return f"loss {show(loss)}" if known(loss) else DASH


def _chart(networks: Networks, rows: dict[str, dict[str, Row]], schemes: list[str], data: Data) -> Picture | None:
    values = {
        name: {key: [100 * number(found.get(s, {}).get(key)) for s in schemes] for key in FIELDS[2:]}
        for name, found in rows.items()
    }
    if not any_known([number_ for value in values.values() for number_ in value["top1"]]):
        return None
    title, sentences = "Top-1, predicted and measured", []
    for name, value in values.items():
        pairs = zip(schemes, value["top1"], value["measured_top1"], strict=True)
        said = (f"{scheme} {show(told)} % predicted, {show(seen)} % measured" for scheme, told, seen in pairs)
        sentences.append(f"{name}: {', '.join(said)}.")
    return Picture(title, _draw(f"{title}. {' '.join(sentences)}", networks, values, schemes), data)


def _draw(alt: str, networks: Networks, values: dict[str, dict[str, list[float]]], schemes: list[str]) -> str:
    with canvas() as figure:
        axes = figure.subplots()
        for i, (name, value) in enumerate(values.items()):
            x = [place + 0.1 * (i - (len(values) - 1) / 2) for place in range(len(schemes))]
            index, told = networks.colour(name), value["top1"]
            spread = [
                [abs(t - b) if known(t - b) else 0 for t, b in zip(told, value[k], strict=True)] for k in FIELDS[3:5]
            ]
            looks: dict[str, Any] = {"color": LIGHT[index], "marker": MARKERS[index], "markersize": 6}
            axes.errorbar(
                x, told, yerr=spread, markerfacecolor=PAGE, linewidth=0, elinewidth=1.3, capsize=3, zorder=2, **looks
            )
            axes.plot(x, value["measured_top1"], linewidth=1.6, zorder=3, **looks)
        axes.set_xticks(range(len(schemes)), [label(scheme) for scheme in schemes])
        axes.set_xlim(-0.4, len(schemes) - 0.6)
        axes.set_ylabel("top-1 accuracy (%)")
        plain_ticks(axes, x=False)
        others: dict[str, dict[str, Any]] = {
            "predicted": {"marker": "o", "markersize": 6, "markerfacecolor": PAGE, "linewidth": 0},
            "measured": {"marker": "o", "markersize": 6, "linewidth": 1.6},
        }
        name_lines(figure, [(name, networks.colour(name)) for name in values], others)
        return inline(figure, "prediction-", alt)
