"""The page in a real browser, where there is one: no complaint, and no sideways scrolling on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planish.report.html import render_report, write_report
from tests.browser import Browser
from tests.report.flatness import fake_flatness

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--dump-dom",
]
# The page stands in a frame of the wanted width, since a browser window has a least width of its own.
OUTER = """<!doctype html><iframe id="f" style="border:0;width:WIDTHpx;height:800px" srcdoc="PAGE"></iframe><pre></pre>
<script>document.getElementById("f").onload = () => {
  const page = document.getElementById("f").contentDocument, root = page.documentElement;
  const labels = [...page.querySelectorAll("svg")].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
      const b = text.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
    }).map(text => text.textContent);
  });
  const tables = [...page.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth);
  document.querySelector("pre").textContent = JSON.stringify(
    {width: root.clientWidth, scroll: root.scrollWidth, clipped: labels, tables: tables});
}</script>"""


def look(page: str, width: int, folder: Path) -> tuple[dict[str, Any], str]:
    """What the browser measures of ``page`` at ``width`` CSS pixels, and its log."""
    outer = OUTER.replace("WIDTH", str(width)).replace("PAGE", html.escape(page))
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", (folder / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_and_is_silent(
    fake: Callable[..., dict[str, Any]], ledger: list[dict[str, Any]], tmp_path: Path, width: int
) -> None:
    results = fake(3, ("rtn", "a-method-with-a-long-name"))
    results["protocol"]["hash"] = "0123456789abcdef" * 8
    results["rows"] += [{**r, "arm": "an-arm-with-quite-a-long-name"} for r in results["rows"] if r["arm"] == "tuned"]
    page = render_report({**results, "ledger": ledger}).replace("<details>", "<details open>")
    found, log = look(page, width, tmp_path)
    assert found["width"] == width
    assert found["scroll"] == width
    assert found["clipped"] == []
    assert "CONSOLE" not in log


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_usual_table_needs_no_scrolling_on_a_phone(fake: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found, _ = look(render_report(fake(3)), 390, tmp_path)
    assert found["tables"] == [0]


# Of every label: whether it is inside its picture, and which other label of the same picture it lies on.
LABELS = """[...document.querySelectorAll("svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect(), name = svg.getAttribute("aria-label").slice(0, 40);
  const words = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  const out = words.filter(([, b]) =>
    b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1);
  const on = words.filter(([, a], i) => words.some(([, b], j) => j > i && Math.min(a.right, b.right)
    - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4));
  return [...out.map(([text]) => `${name}: ${text} is clipped`), ...on.map(([text]) => `${name}: ${text} is covered`)];
})"""
LOOKS = ("light", "dark")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def check(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.go(page.as_uri(), width=width, scheme=scheme)
    browser.eval("document.querySelectorAll('details').forEach(it => it.open = true)")
    assert browser.complaints() == []
    assert browser.eval("document.documentElement.scrollWidth") == width
    assert browser.eval(LABELS) == []
    assert all(address.startswith(("file:", "data:")) for address in browser.requested())
    backgrounds = browser.eval("getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {"light": "rgb(252, 252, 251)", "dark": "rgb(21, 23, 26)"}[scheme]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_diagnosed_page_fits_and_is_silent(diagnosed: str, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(diagnosed, encoding="utf-8")
    for width in (390, 1200):
        for scheme in LOOKS:
            check(browser, page, width, scheme)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_five_networks_with_hundreds_of_long_sites_fit(browser: Browser, tmp_path: Path) -> None:
    names = ("given", "tuned", "sam", "flat", "an arm with quite a long name of its own")
    flatness = fake_flatness(names, blocks=20, depth="model.backbone.stages.blocks")
    page = write_report({"flatness": flatness}, tmp_path / "page.html")
    assert page.stat().st_size < 1_500_000
    check(browser, page, 390, "dark")
    check(browser, page, 1200, "light")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_colours_of_pictures_follow_the_theme(diagnosed: str, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(diagnosed, encoding="utf-8")
    seen = []
    for scheme in LOOKS:
        browser.go(page.as_uri(), scheme=scheme)
        first = "getComputedStyle(document.querySelector('#why-{} ~ .charts:last-of-type svg {}')).fill"
        seen.append(
            [browser.eval(first.format("landscape", "path[style*=heat]")), browser.eval(first.format("split", "text"))]
        )
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]
