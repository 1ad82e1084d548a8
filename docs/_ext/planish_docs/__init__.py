"""The project's own part of its documentation site: facts from sources and benchmarks, formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def only_present(text: str, folder: Path) -> str:
    """The text without the lines ``page?`` of a table of contents whose page is not there."""
    return re.sub(
        r"^([\w./-]+)\?\n", lambda m: f"{m[1]}\n" * (folder / f"{m[1]}.md").exists(), text, flags=re.MULTILINE
    )


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    from planish_docs import facts, mathml, reference

    root = Path(app.srcdir)

    def replace_marks(app: Any, name: str, source: list[str]) -> None:
        source[0] = reference.expand(facts.expand(only_present(source[0], app.env.doc2path(name).parent), root))

    app.connect("source-read", replace_marks)
    app.connect("missing-reference", reference.resolve)
    app.connect("autodoc-process-docstring", reference.plain_signs)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml.visit, None), block_renderers=(mathml.visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
