"""The pages as files: links that work on a code host and on the site, formulas, notebooks without outputs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from planish.cli.main import _parse
from tests.docs.blocks import commands

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def prose(path: Path) -> str:
    """A page without code; of a notebook the Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that code hosts and the site give to the headings."""
    heads = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "`", prose(path))):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        assert not file.startswith("/"), f"{target} means nothing on a code host"
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_formulas_can_be_drawn():
    pytest.importorskip("sphinx")
    from planish_docs.mathml import render

    count = 0
    for path in PAGES:
        text = re.sub(r"`[^`]*`", "", prose(path))
        blocks = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
        inline = re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", text)
        for formula in (*blocks, *inline):
            drawn = render(formula, block=formula in blocks)
            assert drawn.startswith("<math"), f"{path}: {formula}"
            count += 1
    assert count > 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 5
    for cell in code:
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("page", ["start.md", *(f"guide/{p.name}" for p in (ROOT / "docs/guide").glob("*.md"))])
def test_commands_parse(page):
    for command in commands(page):
        assert type(_parse(shlex.split(command)[1:])).__name__.lower() == command.split()[1]
