"""How the loss answers to Gaussian noise on the weights and on the activations."""

from __future__ import annotations

from planish.report.diagnosis.parts import Networks, Picture, Section, any_known, rows_file
from planish.report.diagnosis.plots import in_words, line_chart, line_of

ROUNDING = 12**-0.5  # steps: the standard deviation of the uniform law


def section(networks: Networks) -> Section | None:
    """The chapter of noise; None if it was not measured."""
    pictures = [p for p in (_response(networks, "weight"), _response(networks, "activation")) if p]
    if not pictures:
        return None
    intro = (
        "The mean loss under Gaussian noise of growing size, in steps of the grid; bands are standard errors over "
        "draws. Rounding without clipping is noise of 0.29 steps."
    )
    return Section("noise", "Response to noise", intro, [pictures])


def _response(networks: Networks, kind: str) -> Picture | None:
    key = f"{kind}_noise"
    names = networks.having("sharpness", key)
    rows = {name: networks.rows(name, "sharpness", key) for name in names}
    lines = [line_of(networks, name, rows[name], "sigma", "loss") for name in names]
    if not (lines := [line for line in lines if any_known(line.y)]):
        return None
    title = f"Noise on the {kind}s"
    data = rows_file(f"noise-{kind}s", ("sigma", "loss", "error"), rows)
    marks = {ROUNDING: "rounding"} if max(max(line.x) for line in lines) > 2 * ROUNDING else {}
    alt = f"Loss against the size of noise on the {kind}s. {' '.join(in_words(line) for line in lines)}"
    return Picture(
        title,
        line_chart(f"noise-{kind}", alt, lines, "standard deviation of the noise (steps)", "loss (nats)", marks=marks),
        data,
    )
