"""The charts: labels, words, colours from the page, same rows same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from planish.report.charts import accuracy_charts, chart_png
from planish.report.svg import DARK, LIGHT, colour_index, label

Fake = Callable[..., dict[str, Any]]


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter("text")]


def test_labels_are_text_in_order_of_bits(fake: Fake) -> None:
    (chart,) = accuracy_charts(fake()["rows"])
    found = texts(chart.svg)
    assert [t for t in found if t in {"fp32", "w4a4", "w3a3", "w2a4"}] == ["fp32", "w4a4", "w3a3", "w2a4"]
    assert [t for t in found if t in {"given", "tuned", "averaged", "flat"}] == ["given", "tuned", "averaged", "flat"]
    assert "top-1 accuracy (%)" in found


def test_every_value_is_in_the_alternative_text(fake: Fake) -> None:
    (chart,) = accuracy_charts(fake(3)["rows"])
    assert "flat: fp32 91.7 \N{PLUS-MINUS SIGN} 0.2 %, w4a4 89.6" in chart.alt
    given = chart.alt.partition("given:")[2].partition("tuned:")[0]
    assert "w3a3" in given
    assert "w2a4" not in given
    root = ElementTree.fromstring(chart.svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == chart.alt


def test_one_chart_a_method_with_ids_of_its_own(fake: Fake) -> None:
    charts = accuracy_charts(fake(1, ("rtn", "gptq"))["rows"])
    assert [chart.method for chart in charts] == ["rtn", "gptq"]
    ids = [found for chart in charts for found in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for chart in charts:
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', chart.svg)
        assert used
        assert all((a or b) in ids for a, b in used)


def test_colours_come_from_the_page_and_nothing_from_outside(fake: Fake) -> None:
    (chart,) = accuracy_charts(fake(3)["rows"])
    assert "currentColor" in chart.svg
    assert "var(--arm-4, " in chart.svg
    assert "var(--line, " in chart.svg
    bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", chart.svg)
    assert re.findall(r"#[0-9a-f]{6}\b", bare) in ([], ["#000000"] * bare.count("#000000"))
    assert "http" not in chart.svg
    assert "<metadata" not in chart.svg
    assert "<!" not in chart.svg


def test_same_rows_same_bytes_whatever_the_users_style(fake: Fake, tmp_path: Path) -> None:
    import matplotlib as mpl

    first = accuracy_charts(fake(3)["rows"])
    png = chart_png(fake(3), tmp_path / "a.png").read_bytes()
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linestyle": ":"}):
        assert accuracy_charts(fake(3)["rows"]) == first
        assert chart_png(fake(3), tmp_path / "b.png").read_bytes() == png
        assert mpl.rcParams["font.size"] == 30
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$x_$", "_hidden", "a\x00b\nc", "x" * 200])
def test_any_name_gives_a_well_formed_chart(fake: Fake, name: str) -> None:
    rows = [{**r, "arm": name if r["arm"] == "given" else r["arm"]} for r in fake()["rows"]]
    (chart,) = accuracy_charts(rows)
    assert "<script" not in chart.svg
    shown = [text.strip("\N{ZERO WIDTH SPACE}") for text in texts(chart.svg.replace("\0", ""))]
    assert any(text[:3].replace("?", "\0") == name[:3] for text in shown)


def test_a_leading_underscore_is_hidden_from_matplotlib() -> None:
    assert not label("_hidden").startswith("_")
    assert label("_hidden").endswith("_hidden")


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert accuracy_charts([]) == []
    assert chart_png({"rows": []}, tmp_path / "a.png").stat().st_size > 0


def test_the_usual_arms_keep_their_colour() -> None:
    assert colour_index("flat", ["flat"]) == colour_index("flat", ["given", "flat"]) == 4
    assert colour_index("mine", ["given", "mine"]) == 5
    assert len({colour_index(name, "abcde") for name in "abcde"}) == 5
    assert not {colour_index(name, ["given", "flat", *"abcde"]) for name in "abcde"} & {0, 4}
    assert len(LIGHT) == len(DARK) == len(set(LIGHT)) == len(set(DARK))


def test_a_long_legend_does_not_squeeze_the_chart_and_keeps_both_ends_of_names(fake: Fake) -> None:
    rows = [
        {**row, "arm": f"a-run-with-a-very-long-name-indeed-{i}-and-still: {row['arm']}"}
        for row in fake()["rows"]
        for i in range(3)
    ]
    (chart,) = accuracy_charts(rows)
    (usual,) = accuracy_charts(fake()["rows"])
    heights = [float(ElementTree.fromstring(c.svg).get("viewBox", "").split()[3]) for c in (usual, chart)]
    assert heights[0] == 270
    assert heights[1] > 270 + 9 * 12
    assert len([text for text in texts(chart.svg) if text.endswith(": flat") and text.startswith("a-run")]) == 3
