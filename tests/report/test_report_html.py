"""The page: what it says, that nothing gets out of its quotes, and that it stands alone."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from planish.errors import PlanishError
from planish.report.html import render_report, rows_csv, write_report
from tests.report.flatness import fake_flatness

Fake = Callable[..., dict[str, Any]]


class Page(HTMLParser):
    """All tags with their attributes, and the text of each table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.lines: list[list[str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.lines.append([])
        elif tag in ("td", "th"):
            self.lines[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lines and self.lines[-1]:
            self.lines[-1][-1] += data.strip(" \n") and data.strip("\n")


def test_the_page_says_everything(fake: Fake) -> None:
    text = render_report(fake())
    page = Page(text)
    assert "At w2a4, flat keeps 59.8 % top-1 where averaged, the best other arm, keeps 40.2 %" in page.text
    assert "calibration images" in page.text
    assert "1024" in page.text
    assert "0123456789abcdef" in page.text
    assert [line[:1] for line in page.lines] == [["arm"], ["given"], ["tuned"], ["averaged"], ["flat"]]
    assert page.lines[0][1:] == ["FP top-1", "w4a4 rtn", "w3a3 rtn", "w2a4 rtn"]
    assert "<strong>85.1</strong>" in text
    assert "<strong>80.7</strong>" not in text
    order = [text.index(f'id="{name}"') for name in ("protocol", "results", "chart", "data", "environment")]
    assert order == sorted(order)
    assert "Test OS" in page.text
    assert "<details>" not in text


def test_what_was_not_measured_is_a_dash(fake: Fake) -> None:
    page = Page(render_report(fake()))
    assert page.lines[1][1:4] == ["91.2", "86.1", "70.2"]
    assert page.lines[1][4].strip() == "\N{EN DASH}"
    assert "A dash was not measured." in page.text
    full = fake()
    full["rows"] = [r for r in full["rows"] if r["arm"] != "given"]
    assert "A dash" not in render_report(full)


def test_seeds_are_shown_as_mean_and_standard_error(fake: Fake) -> None:
    text = render_report(fake(3))
    assert "<strong>85.1</strong> <small>\N{PLUS-MINUS SIGN} 0.2</small>" in text
    assert "standard error over up to 3 seeds" in text


def test_the_ledger_is_folded_away(fake: Fake, ledger: list[dict[str, Any]]) -> None:
    text = render_report({**fake(), "ledger": ledger})
    assert "<summary>Coverage: 11 sites</summary>" in text
    line = Page(text).lines[-2]
    assert [part.strip() for part in line] == ["blocks.2.attn.q@k", "linear", "4", "channel", "9.87 %"]
    assert [part.strip() for part in Page(text).lines[-1]] == ["norm", "layer_norm", *"\N{EN DASH}" * 3]


def test_the_csv_link_holds_the_rows(fake: Fake) -> None:
    results = fake(3)
    (link,) = [attrs["href"] for tag, attrs in Page(render_report(results)).tags if tag == "a"]
    assert link is not None
    assert link.startswith("data:text/csv")
    rows = list(csv.DictReader(io.StringIO(unquote(link.partition(",")[2]))))
    assert len(rows) == len(results["rows"])
    assert float(rows[0]["top1"]) == results["rows"][0]["top1"]
    assert rows[0]["flip_rate"] == ""
    assert rows_csv([{"arm": "a,b", "note": 1}]).splitlines()[1].startswith('"a,b",')


def test_a_hostile_name_is_only_text(fake: Fake, ledger: list[dict[str, Any]]) -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    results = fake(1, ("rtn", evil))
    results["rows"] = [{**r, "arm": evil if r["arm"] == "flat" else r["arm"]} for r in results["rows"]]
    results["rows"].append({"arm": "given", "scheme": evil, "method": "rtn", "top1": 0.5})
    results["protocol"] |= {"model": evil, evil: evil}
    results["environment"] = {evil: evil}
    results["ledger"] = [dict.fromkeys(row, evil) for row in ledger]
    text = render_report(results)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert evil in page.text


def test_the_page_stands_alone(fake: Fake, ledger: list[dict[str, Any]]) -> None:
    text = render_report({**fake(3), "ledger": ledger})
    assert not re.search(r"https?:|//[a-z]", text)
    for tag, attrs in Page(text).tags:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_same_results_same_page(fake: Fake, tmp_path: Path) -> None:
    first = write_report(fake(3), tmp_path / "a.html").read_bytes()
    assert write_report(fake(3), tmp_path / "b.html").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


@pytest.mark.parametrize("results", [{}, {"rows": []}, {"rows": [{}], "protocol": {"model": None}}])
def test_little_to_show_is_still_a_page(results: dict[str, Any]) -> None:
    text = render_report(results)
    assert "No accuracy was measured in this run." in text
    assert "<svg" not in text


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match=r"a\.html: cannot write here"):
        write_report({}, tmp_path / "missing" / "a.html")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_wcag_aa(theme: int) -> None:
    """WCAG 2.2: 4.5:1 for text (1.4.3), 3:1 for lines and markers (1.4.11)."""
    block = re.findall(r":root \{(.*?)\}", render_report({}), flags=re.DOTALL)[theme]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block))
    page = luminance(colours.pop("page"))
    arms = [name for name in colours if name.startswith("arm-")]
    assert len(arms) == 8
    assert {"ink", "soft", "link"} <= set(colours)
    for name, least in {"ink": 7.0, "soft": 4.5, "link": 4.5, **dict.fromkeys(arms, 3.0)}.items():
        light, dark = sorted((luminance(colours[name]), page), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, name


def test_a_diagnosis_is_told_between_the_results_and_the_numbers(diagnosed: str) -> None:
    ids = ("protocol", "results", "chart", "why", "why-landscape", "why-damage", "next", "data", "environment")
    order = [diagnosed.index(f'id="{name}"') for name in ids]
    assert order == sorted(order)
    page = Page(diagnosed)
    assert "blocks.3.attn.proj loses most; keep it at 8 bits for +0.8 points and 12 kB." in page.text
    assert "rise of the loss along the rounding" in page.text
    assert "0.220" in page.text
    assert "<summary>All 76 sites" in diagnosed


def test_without_a_diagnosis_there_is_no_chapter(fake: Fake) -> None:
    text = render_report(fake())
    assert 'id="why' not in text
    assert 'id="next"' not in text
    assert render_report({**fake(), "flatness": {"networks": {"given": {}}}}) == text


def test_a_run_without_rows_is_told_by_its_diagnosis() -> None:
    text = render_report({"flatness": fake_flatness(("given",), blocks=1)})
    assert "At w4a4, the loss of given changes from 0.310 to 0.890." in text
    assert "No accuracy" not in text


def test_headings_follow_each_other_and_tables_say_what_they_are(diagnosed: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(diagnosed).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    tables = re.findall(r"<table>.*?</table>", diagnosed, re.DOTALL)
    assert len(tables) >= 9
    for table in tables:
        assert re.search(r"<caption.*?>.*?\w.*?</caption>", table, re.DOTALL)
        assert "<th>" not in table
        assert table.count('scope="row"') == len(re.findall("<tr>", table)) - 1


def test_every_picture_has_words_and_its_numbers(diagnosed: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", diagnosed, re.DOTALL)
    assert len(figures) >= 19
    for figure in figures:
        assert re.search(r'<svg [^>]*role="img" aria-label="[^"]{40,}"', figure)
    linked = [figure for figure in figures if "<a download=" in figure]
    assert len(linked) == len(figures) - 1  # the rows of the first one have a section of their own
    for figure in linked:
        (link,) = re.findall(r'href="data:text/csv;charset=utf-8,([^"]+)"', figure)
        rows = list(csv.reader(io.StringIO(unquote(html.unescape(link)))))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 2


def test_ids_of_a_diagnosed_page_are_unique(diagnosed: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', diagnosed)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', diagnosed)
    assert {a or b or c for a, b, c in used} <= set(ids)


def test_a_diagnosed_page_stands_alone_and_is_small(diagnosed: str) -> None:
    assert not re.search(r"https?:|<script|<iframe|@import|<img|url\((?!#)", diagnosed)
    assert len(diagnosed.encode()) < 700_000


def test_a_hostile_diagnosis_is_only_text() -> None:
    evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    flatness = fake_flatness(("given", evil), blocks=1, depth=evil)
    flatness["scheme"] = evil
    flatness["advice"] = [{"text": evil}]
    flatness["headline"] |= {"name": evil, "text": evil}
    for site in flatness["networks"][evil]["errors"]["sites"]:
        site["verdict"] = evil
    text = render_report({"flatness": flatness})
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert evil in page.text
