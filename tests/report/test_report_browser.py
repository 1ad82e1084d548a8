"""The page in a real browser, where there is one: no complaint, and no sideways scrolling on a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from planish.report.html import render_report

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
