"""Bar charts of a diagnosis: all networks side by side, upright or ranked from the worst."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planish.report.diagnosis.parts import any_known, known
from planish.report.diagnosis.plots import plain_ticks
from planish.report.svg import LIGHT, PAGE, TEXT, canvas, inline, label, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bars:
    """One network in a bar chart: a value for each category, its standard error, and a prediction to set beside it."""

    name: str
    colour: int
    values: list[float]
    errors: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)


def bar_chart(
    key: str, alt: str, categories: Sequence[str], groups: Sequence[Bars], ylabel: str, predicted: str
) -> str:
    """Upright bars, all networks side by side; ``predicted`` names the diamonds, if there are any."""
    with canvas() as figure:
        axes = figure.subplots()
        width = 0.8 / len(groups)
        for number_, group in enumerate(groups):
            places = [i + width * (number_ - (len(groups) - 1) / 2) for i in range(len(categories))]
            axes.bar(
                places, group.values, width=0.88 * width, color=LIGHT[group.colour], zorder=2, yerr=_errors(group),
                error_kw={"ecolor": TEXT, "elinewidth": 1},
            )  # fmt: skip
            if group.predicted:
                axes.plot(places, group.predicted, "D", color=PAGE, markeredgecolor=TEXT, markersize=5.5, zorder=4)
        axes.axhline(0, color=TEXT, linewidth=0.8, zorder=3)
        axes.set_xticks(range(len(categories)), [label(category) for category in categories])
        axes.set_ylabel(ylabel)
        plain_ticks(axes, x=False)
        drawn = any(any_known(group.predicted) for group in groups)
        diamond = {"marker": "D", "markerfacecolor": PAGE, "markersize": 5.5, "linewidth": 0}
        bars_legend(figure, groups, {predicted: diamond} if drawn else {})
        return inline(figure, f"{key}-", alt)


def ranked_chart(key: str, alt: str, names: Sequence[str], groups: Sequence[Bars], xlabel: str) -> str:
    """Horizontal bars, the first name at the top, all networks side by side; long names are shortened."""
    shown = short_names(names)
    height = 10 + 6 * len(groups)
    with canvas(400, 90 + height * len(names)) as figure:
        axes = figure.subplots()
        width = 0.72 / len(groups)
        for number_, group in enumerate(groups):
            places = [i + width * (number_ - (len(groups) - 1) / 2) for i in range(len(names))]
            axes.barh(
                places, group.values, height=0.9 * width, color=LIGHT[group.colour], zorder=2, xerr=_errors(group),
                error_kw={"ecolor": TEXT, "elinewidth": 1},
            )  # fmt: skip
        axes.axvline(0, color=TEXT, linewidth=0.8, zorder=3)
        axes.set_yticks(range(len(names)), [shown[name] for name in names], fontsize=11)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        plain_ticks(axes, y=False)
        bars_legend(figure, groups)
        return inline(figure, f"{key}-", alt, {short: name for name, short in shown.items() if short != name})


def _errors(group: Bars) -> list[float] | None:
    return [error if known(error) else 0 for error in group.errors] if any_known(group.errors) else None


def bars_legend(figure: Figure, groups: Sequence[Bars], others: Mapping[str, dict[str, Any]] | None = None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: dict[str, Any] = {}
    if len(groups) > 1:
        handles = {group.name: Patch(color=LIGHT[group.colour]) for group in groups}
    for name, looks in (others or {}).items():
        handles[name] = Line2D([], [], **{"color": TEXT, **looks})
    legend(figure, list(handles.values()), list(handles))


_OPERATORS = re.compile(r"(?<=.)\.(linear|conv\dd|conv_transpose\dd)$")


def short_names(names: Sequence[str], length: int = 24) -> dict[str, str]:
    """Labels for the names of sites and products: bounded and all different.

    Numbers and the end of a name tell most: of the words before them one letter is kept, from the left, as far as
    needed (``b.3.attn.attention_qk``); what is still too long loses its beginning.
    """
    found: dict[str, str] = {}
    last = {name.rpartition(".")[2] for name in names}
    drop = f".{last.pop()}" if len(last) == 1 and len(names) > 1 else ""  # what all end with tells nothing
    for name in names:
        text = _OPERATORS.sub("", name).removesuffix(drop) or name
        text = "".join(char if char.isprintable() else "?" for char in text)
        words = text.split(".")
        for i, word in enumerate(words[:-1]):
            if len(".".join(words)) > length:
                words[i] = word if word.isdigit() else word[:1]
        text = ".".join(words)
        if len(text) > length:
            text = f"\N{HORIZONTAL ELLIPSIS}{text[1 - length :]}"
        text = "\N{ZERO WIDTH SPACE}" + text if text.startswith("_") else text
        taken, number_, stem = set(found.values()), 2, text
        while text in taken:
            text, number_ = f"{stem} ({number_})", number_ + 1
        found[name] = text
    return found
