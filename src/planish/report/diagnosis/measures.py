"""The measure that predicts best, in large figures, and all others in a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planish.report.diagnosis.noise import ROUNDING
from planish.report.diagnosis.parts import (
    NAN,
    Networks,
    Table,
    any_known,
    known,
    mapping,
    number,
    numbers,
    show,
    with_error,
)
from planish.report.diagnosis.plots import tick


@dataclass(frozen=True)
class Headline:
    """One measure: its name, what it is in a sentence, and its value with the colour of every network."""

    name: str
    text: str
    values: list[tuple[str, int, str]]


def headline(networks: Networks) -> Headline | None:
    """The measure that the diagnosis puts first; None if it names none."""
    found = mapping(networks.flatness.get("headline"))
    values = mapping(found.get("values"))
    shown = [(n, networks.colour(n), show(number(values.get(n)))) for n in networks.names if n in values]
    return Headline(str(found.get("name") or ""), str(found.get("text") or ""), shown) if shown else None


def table(networks: Networks) -> Table | None:
    """All measures of sharpness, one line each; lower is flatter. How much each tells, where the diagnosis says so."""
    lines = [line for line in _lines(networks) if any(cell != show(NAN) for cell in line[2:])]
    if not lines:
        return None
    caption = "Measures of sharpness; lower is flatter. Losses are in nats."
    ranks = mapping(mapping(networks.flatness.get("headline")).get("ranks"))
    if not ranks:
        return Table(caption, ("", *networks.names), [line[1:] for line in lines])
    told = [(*line[1:], str(ranks.get(line[0], show(NAN)))) for line in lines]
    return Table(caption, ("", *networks.names, "tells"), told)


def _lines(networks: Networks) -> Iterator[tuple[str, ...]]:
    """A key, the words, and a cell for each network."""
    names = networks.names
    yield ("loss", "loss in float", *(show(networks.number(n, "loss")) for n in names))
    both = (show(networks.number(n, "split", "both")) for n in names)
    yield ("both", f"rise of the loss at {networks.scheme}", *both)
    yield ("imitated", "divergence under imitated rounding", *(show(_imitated(networks, n)) for n in names))
    yield ("rounding", "rise along the rounding of the weights", *(show(_rounded(networks, n)) for n in names))
    for key, words in (
        ("sam", "SAM: worst rise nearby"),
        ("asam", "ASAM: the same, relative to each weight"),
        ("worst", "worst corner of the rounding"),
    ):
        yield from _nearby(networks, key, words)
    for key, words in (
        ("weight_noise", "rise under noise on the weights"),
        ("activation_noise", "rise under noise on the activations"),
    ):
        yield from _noisy(networks, key, words)
    traces = [networks.mapping(n, "curvature", "trace") for n in names]
    traced = (with_error(number(t.get("value")), number(t.get("error"))) for t in traces)
    yield ("trace", "trace of the Hessian", *traced)
    tops = [numbers(networks.mapping(n, "curvature").get("eigenvalues")) for n in names]
    yield ("eigenvalue", "largest eigenvalue", *(show(top[0] if top else NAN) for top in tops))
    others = mapping(networks.flatness.get("headline")).get("others")
    for other in others if isinstance(others, list) else []:
        values = mapping(mapping(other).get("values"))
        yield ("", str(mapping(other).get("name")), *(show(number(values.get(n))) for n in names))


def _imitated(networks: Networks, name: str) -> float:
    rows = [row for row in networks.rows(name, "prediction") if row.get("scheme") == networks.scheme]
    return number(rows[0].get("divergence")) if rows else NAN


def _rounded(networks: Networks, name: str) -> float:
    """The rise of the loss from the float weights to the rounded ones."""
    path = {number(row.get("t")): number(row.get("loss")) for row in networks.rows(name, "sharpness", "rounding")}
    return path.get(1.0, NAN) - path.get(0.0, NAN)


def _nearby(networks: Networks, key: str, words: str) -> Iterator[tuple[str, ...]]:
    found = [networks.mapping(n, "sharpness", key) for n in networks.names]
    radii = {tick(rho) for f in found if known(rho := number(f.get("rho")))}
    words += f" (\N{GREEK SMALL LETTER RHO} = {radii.pop()})" if len(radii) == 1 else ""
    yield (key, words, *(with_error(number(f.get("increase")), number(f.get("error"))) for f in found))


def _noisy(networks: Networks, key: str, words: str) -> Iterator[tuple[str, ...]]:
    """The rise at the noise that is nearest to that of rounding, of those that all networks were given."""
    rows = {n: networks.rows(n, "sharpness", key) for n in networks.having("sharpness", key)}
    sizes = [{number(r.get("sigma")) for r in found if any_known([number(r.get("loss"))])} for found in rows.values()]
    shared = {size for size in set.intersection(*sizes) if known(size)} if sizes else set()
    if not shared:
        return
    size = min(shared, key=lambda size: abs(size - ROUNDING))

    def rise(name: str) -> float:
        noisy = [number(row.get("loss")) for row in rows.get(name, []) if number(row.get("sigma")) == size]
        path = networks.rows(name, "sharpness", "rounding")  # its start is the float network on the same images
        clean = [number(row.get("loss")) for row in path if number(row.get("t")) == 0]
        return (noisy or [NAN])[0] - (clean or [networks.number(name, "loss")])[0]

    words += f" (\N{GREEK SMALL LETTER SIGMA} = {tick(size)} steps)"
    yield (key, words, *(show(rise(n)) for n in networks.names))
