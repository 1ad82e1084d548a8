"""Where the lost accuracy comes from: weights or activations, and which products."""

from __future__ import annotations

from collections.abc import Iterable

from planish.report.diagnosis.bars import Bars, bar_chart, ranked_chart
from planish.report.diagnosis.parts import NAN, Networks, Picture, Section, any_known, known, number, rows_file, show

WORST = 12
PARTS = ("weights", "activations", "interaction", "both")
TAYLOR = ("taylor_weights", "taylor_activations")


def section(networks: Networks) -> Section | None:
    """The chapter of the split; None if it was not measured."""
    pictures = [p for p in (_parts(networks), _products(networks)) if p]
    if not pictures:
        return None
    intro = (
        f"By how much the loss rises at {networks.scheme} when only the weights are rounded, only the activations, or "
        "both; the interaction is what both together cost beyond the sum. Then the same for one product at a time."
    )
    return Section("split", "Where the loss comes from", intro, [pictures])


def _parts(networks: Networks) -> Picture | None:
    groups, words = [], []
    for name in networks.having("split"):
        values = [networks.number(name, "split", part) for part in PARTS]
        predicted = [networks.number(name, "split", part) for part in TAYLOR]
        if not any_known(values):
            continue
        errors = [
            networks.number(name, "split", key)
            for key in ("weights_error", "activations_error", "interaction_error", "error")
        ]
        taylor = [*predicted, NAN, sum(predicted)] if any_known(predicted) else []
        groups.append(Bars(name, networks.colour(name), values, errors, taylor))
        said = [f"{part} {show(value)}" for part, value in zip(PARTS, values, strict=True)]
        said += [
            f"Taylor's formula for {p.partition('_')[2]} {show(v)}" for p, v in zip(TAYLOR, predicted, strict=True)
        ]
        words.append(f"{name}: {', '.join(said)}.")
    if not groups:
        return None
    title = "Rise of the loss, split"
    fields = ("loss", *PARTS, *TAYLOR)
    data = rows_file("split", fields, {g.name: [networks.mapping(g.name, "split")] for g in groups})
    svg = bar_chart(
        "split", f"{title}, in nats. {' '.join(words)}", PARTS, groups, "rise of the loss (nats)", "second-order Taylor"
    )
    return Picture(title, svg, data)


def _products(networks: Networks) -> Picture | None:
    rows = {name: networks.rows(name, "split", "layers") for name in networks.having("split", "layers")}
    damage = {name: {str(r.get("product")): number(r.get("both")) for r in found} for name, found in rows.items()}
    names = worst(damage.values())
    if not names:
        return None
    groups = [Bars(n, networks.colour(n), [values.get(p, NAN) for p in names]) for n, values in damage.items()]
    title = "Rise of the loss by product" + (
        ", the worst" if len({p for d in damage.values() for p in d}) > len(names) else ""
    )
    words = [
        f"{g.name}: {', '.join(f'{p} {show(v)}' for p, v in list(zip(names, g.values, strict=True))[:5])}."
        for g in groups
    ]
    fields = ("product", "macs", *PARTS, *TAYLOR)
    data = rows_file("products", fields, rows)
    alt = f"{title}, in nats, when one product alone is rounded. {' '.join(words)}"
    return Picture(title, ranked_chart("products", alt, names, groups, "rise of the loss (nats)"), data)


def worst(found: Iterable[dict[str, float]], most: int = WORST, size: bool = False) -> list[str]:
    """The names with the largest value in any network, the largest first; with ``size`` whatever its sign."""
    largest: dict[str, float] = {}
    for values in found:
        for name, value in values.items():
            if known(value):
                value = abs(value) if size else value
                largest[name] = max(largest.get(name, value), value)
    return sorted(largest, key=lambda name: -largest[name])[:most]
