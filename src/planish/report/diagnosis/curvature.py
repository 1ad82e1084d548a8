"""The Hessian of the loss: its trace, its largest eigenvalues, how the others lie, and where the curvature is."""

from __future__ import annotations

from planish.report.diagnosis.bars import Bars, ranked_chart
from planish.report.diagnosis.parts import (
    DASH,
    NAN,
    Networks,
    Picture,
    Section,
    Table,
    any_known,
    csv_file,
    known,
    number,
    numbers,
    rows_file,
    show,
    with_error,
)
from planish.report.diagnosis.plots import Line, in_words, line_chart
from planish.report.diagnosis.split import worst

TOP = 5
FLOOR = 1e-6  # of the highest density: below it there is only the noise of the quadrature


def section(networks: Networks) -> Section | None:
    """The chapter of curvature; None if it was not measured."""
    names = networks.having("curvature")
    pictures = [p for p in (_eigenvalues(networks), _density(networks), _layers(networks)) if p]
    if not names or not (pictures or any(known(networks.number(n, "curvature", "trace", "value")) for n in names)):
        return None
    intro = (
        "Second derivatives of the loss with respect to the weights. The trace says how fast it rises in a random "
        "direction, the largest eigenvalues in the worst ones."
    )
    return Section("curvature", "Curvature", intro, [pictures], [_table(networks, names)])


def _table(networks: Networks, names: list[str]) -> Table:
    traces = {n: networks.mapping(n, "curvature", "trace") for n in names}
    tops = {n: numbers(networks.mapping(n, "curvature").get("eigenvalues")) for n in names}
    lines = [("trace", *(with_error(number(traces[n].get("value")), number(traces[n].get("error"))) for n in names))]
    for rank in range(min(TOP, max(map(len, tops.values())))):
        which = "largest eigenvalue" if rank == 0 else f"number {rank + 1}"
        lines.append((which, *(show(tops[n][rank] if rank < len(tops[n]) else NAN) for n in names)))
    for key, words in (("images", "images"), ("probes", "random vectors")):
        values = [networks.number(n, "curvature", key) for n in names]
        if any_known(values):
            lines.append((words, *(f"{value:.0f}" if known(value) else DASH for value in values)))
    caption = "The trace with its standard error over random vectors, and the largest eigenvalues."
    return Table(caption, ("", *names), lines)


def _eigenvalues(networks: Networks) -> Picture | None:
    lines = []
    for name in networks.having("curvature", "eigenvalues"):
        values = numbers(networks.mapping(name, "curvature").get("eigenvalues"))
        if len(values) > 1 and any_known(values):
            lines.append(Line(name, networks.colour(name), [float(i + 1) for i in range(len(values))], values))
    if not lines:
        return None
    title = "Largest eigenvalues of the Hessian"
    words = " ".join(f"{line.name}: {', '.join(map(show, line.y[:TOP]))}." for line in lines)
    data = csv_file(
        "eigenvalues", ("network", "rank", "eigenvalue"),
        [(line.name, int(x), y) for line in lines for x, y in zip(line.x, line.y, strict=True)],
    )  # fmt: skip
    return Picture(title, line_chart("eigenvalues", f"{title}. {words}", lines, "rank", "eigenvalue"), data)


def _density(networks: Networks) -> Picture | None:
    lines, rows = [], []
    for name in networks.having("curvature", "density"):
        density = networks.mapping(name, "curvature", "density")
        x, y = numbers(density.get("x")), numbers(density.get("y"))
        if len(x) != len(y) or not any_known(y):
            continue
        rows += [(name, *point) for point in zip(x, y, strict=True)]
        least = FLOOR * max(value for value in y if known(value))
        lines.append(Line(name, networks.colour(name), x, [v if v >= least and v > 0 else NAN for v in y]))
    if not lines:
        return None
    title = "Spectral density of the Hessian"
    alt = f"{title}. {' '.join(in_words(line) for line in lines)}"
    data = csv_file("density", ("network", "eigenvalue", "density"), rows)
    return Picture(title, line_chart("density", alt, lines, "eigenvalue", "density"), data)


def _layers(networks: Networks) -> Picture | None:
    rows = {name: networks.rows(name, "curvature", "layers") for name in networks.having("curvature", "layers")}
    traces = {n: {str(r.get("layer")): number(r.get("trace")) for r in found} for n, found in rows.items()}
    errors = {n: {str(r.get("layer")): number(r.get("error")) for r in found} for n, found in rows.items()}
    names = worst(traces.values())
    if not names:
        return None
    groups = [
        Bars(
            n,
            networks.colour(n),
            [traces[n].get(layer, NAN) for layer in names],
            [errors[n].get(layer, NAN) for layer in names],
        )
        for n in rows
    ]
    title = "Trace by layer" + (", the largest" if len({x for t in traces.values() for x in t}) > len(names) else "")
    words = " ".join(
        f"{g.name}: {', '.join(f'{x} {show(v)}' for x, v in list(zip(names, g.values, strict=True))[:5])}."
        for g in groups
    )
    fields = ("layer", "weights", "trace", "error")
    data = rows_file("trace-by-layer", fields, rows)
    return Picture(
        title, ranked_chart("trace-layers", f"{title}. {words}", names, groups, "trace of the Hessian"), data
    )
