"""The loss around each network: along its own rounding, along a random direction, and on a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from planish.report.diagnosis.parts import Networks, Picture, Section, csv_file, known, numbers, rows_file, show
from planish.report.diagnosis.plots import Line, in_words, line_chart, line_of, plain_ticks, tick
from planish.report.svg import HEAT_LIGHT, PAGE, TEXT, canvas, inline

LEVELS = len(HEAT_LIGHT)


def section(networks: Networks) -> Section | None:
    """The chapter of landscapes; None if none was measured."""
    pictures = [[*_rounding(networks), *_line(networks)], _planes(networks)]
    if not any(pictures):
        return None
    intro = (
        "The loss on the way from the float weights (0) to the rounded ones (1) and beyond, and around the float "
        "weights in random directions of equal relative size. A flat network stands in a wide valley."
    )
    return Section("landscape", "The landscape", intro, pictures)


_PATHS = (
    ("rounding", "loss", "Loss along the rounding of weights"),
    ("rounding", "top1", "Top-1 along the rounding of weights"),
    ("rounding_low_bit", "loss", "The same on rounded activations: loss"),
)


def _rounding(networks: Networks) -> list[Picture]:
    found = []
    for path, key, title in _PATHS:
        rows = {name: networks.rows(name, "sharpness", path) for name in networks.having("sharpness", path)}
        scale, ylabel = (100, "top-1 (%)") if key == "top1" else (1, "loss (nats)")
        lines = [line_of(networks, name, rows[name], "t", key, scale) for name in rows]
        if lines := [line for line in lines if any(map(known, line.y))]:
            data = rows_file(path.replace("_", "-"), ("t", "loss", "error", "top1"), rows)
            alt = f"{title}, 0 is float and 1 is rounded. {_words(lines, ' %' if key == 'top1' else '')}"
            marks = {1.0: "rounded"} if max(max(line.x) for line in lines) >= 1 else {}
            svg = line_chart(f"{path}-{key}", alt, lines, "from float (0) to rounded (1)", ylabel, marks=marks)
            found.append(Picture(title, svg, data))
    return found


def _line(networks: Networks) -> list[Picture]:
    names = networks.having("landscape", "line")
    rows = {name: networks.rows(name, "landscape", "line") for name in names}
    lines = [line_of(networks, name, rows[name], "t", "loss") for name in names]
    if not (lines := [line for line in lines if any(map(known, line.y))]):
        return []
    title = "Loss along a random direction"
    data = rows_file("line", ("t", "loss", "error"), rows)
    alt = f"{title}, in units of the norm of each filter. {_words(lines)}"
    return [Picture(title, line_chart("line", alt, lines, "distance (norms of each filter)", "loss (nats)"), data)]


def _words(lines: Sequence[Line], unit: str = "") -> str:
    return " ".join(in_words(line, unit) for line in lines)


def _planes(networks: Networks) -> list[Picture]:
    """One picture a network, all on the same scale of colours."""
    planes = {name: plane for name in networks.names if (plane := _plane(networks.mapping(name, "landscape", "plane")))}
    finite = [value for _, _, loss in planes.values() for line in loss for value in line if known(value)]
    if not finite:
        return []
    levels = _levels(min(finite), max(finite))
    found = []
    for name, (a, b, loss) in planes.items():
        title = f"Loss on a plane: {name}"
        here = [value for line in loss for value in line if known(value)]
        alt = f"{title}. From {show(min(here))} to {show(max(here))} nats" if here else f"{title}. Nothing was measured"
        alt += f"; {show(_centre(a, b, loss))} at the network itself." if here else "."
        data = csv_file(
            f"plane-{name}", ("a", "b", "loss"),
            [(x, y, loss[i][j]) for i, x in enumerate(a) for j, y in enumerate(b)],
        )  # fmt: skip
        found.append(Picture(title, _draw_plane(f"plane{networks.names.index(name)}", alt, a, b, loss, levels), data))
    return found


def _plane(plane: dict[str, Any]) -> tuple[list[float], list[float], list[list[float]]] | None:
    """Axes a and b (increasing) and loss[i][j] at a[i], b[j]; None if that is not what is there."""
    a, b, loss = numbers(plane.get("a")), numbers(plane.get("b")), plane.get("loss")
    rows = [numbers(row) for row in loss] if isinstance(loss, list) else []
    fits = len(a) == len(rows) > 1 and len(b) > 1 and all(len(row) == len(b) for row in rows)
    return (a, b, rows) if fits and all(map(known, a + b)) else None


def _centre(a: list[float], b: list[float], loss: list[list[float]]) -> float:
    return loss[min(range(len(a)), key=lambda i: abs(a[i]))][min(range(len(b)), key=lambda j: abs(b[j]))]


def _levels(low: float, high: float) -> list[float]:
    """Bounds of the colours: steps of equal ratio where the loss ranges widely, else of equal size."""
    high = high if high > low else low + max(abs(low), 1.0) * 1e-3
    if low > 0 and high > 8 * low:
        ratio = math.log(high / low)
        return [low * math.exp(ratio * i / LEVELS) for i in range(LEVELS)] + [high]
    return [low + (high - low) * i / LEVELS for i in range(LEVELS)] + [high]


def _draw_plane(
    key: str, alt: str, a: list[float], b: list[float], loss: list[list[float]], levels: list[float]
) -> str:
    import numpy as np
    from matplotlib.patches import Rectangle

    with canvas(320, 320) as figure:
        axes, bar = figure.subplots(2, 1, height_ratios=(24, 1))
        axes.grid(visible=False)
        values = np.ma.masked_invalid(np.array(loss).T)
        slack = 1e-9 * (levels[-1] - levels[0])
        bounds = [levels[0] - slack, *levels[1:-1], levels[-1] + slack]
        bands = axes.contourf(a, b, values, levels=bounds, colors=HEAT_LIGHT)
        bands.set_edgecolor("face")  # else hairlines of the page show between the bands
        bands.set_linewidth(0.6)
        axes.plot([0], [0], "+", color=TEXT, markersize=9, markeredgewidth=3, markeredgecolor=PAGE)
        axes.plot([0], [0], "+", color=TEXT, markersize=9, markeredgewidth=1.4)
        axes.set_aspect("equal")
        axes.tick_params(pad=7)  # else the labels of the corner meet
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        plain_ticks(axes)
        for i, colour in enumerate(HEAT_LIGHT):
            bar.add_patch(Rectangle((i, 0), 1, 1, facecolor=colour, edgecolor=colour, linewidth=0.6))
        bar.set_xlim(0, LEVELS)
        bar.grid(visible=False)
        bar.spines[:].set_visible(False)
        places = range(0, LEVELS + 1, 2)
        bar.set_xticks(places, [tick(float(f"{levels[i]:.2g}")) for i in places])
        bar.set_yticks([])
        bar.set_xlabel("loss (nats)")
        return inline(figure, f"{key}-", alt)
