"""Every method has a page, and what is put into it is what the sources and the benchmarks say."""

from __future__ import annotations

import csv
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from planish_docs import facts, measured

from planish.flattening import FlattenSettings
from planish.ptq import METHODS as PTQ
from planish.qat import METHODS as QAT
from planish.qat.options import option_docs

ROOT = Path(__file__).parent.parent.parent
KINDS = ("ptq", "qat", "flatten")
PAGES = [(kind, name) for kind in KINDS for name in facts.names(kind)]


def rows(name, **wanted):
    with (ROOT / "benchmarks" / name).open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row[k] == v for k, v in wanted.items())]


def test_everything_that_planish_methods_lists_has_a_name_here(capsys):
    from planish.cli.main import main

    assert main(["methods"]) == 0
    listed = re.findall(r"^  (\S+)  ", capsys.readouterr().out, re.MULTILINE)
    known = {name for kind in KINDS for name in facts.names(kind)}
    known |= {name.partition("-")[2] for name in facts.names("flatten")}
    assert len(listed) > 40
    assert set(listed) - known == {"none"}


@pytest.mark.parametrize(("kind", "name"), PAGES, ids=[f"{kind}-{name}" for kind, name in PAGES])
def test_a_page(kind, name):
    text = (ROOT / f"docs/methods/{kind}/{facts.page(kind, name)}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}: ")
    what = text.split("\n\n")[1]
    assert len(re.findall(r"\.(?:\s|$)", what)) == 2, "two sentences"
    assert len(re.findall(r"^\$\$$", text, re.MULTILINE)) == 2, "one formula"
    assert "**When to use it.** " in text
    assert "**Cost.** " in text
    assert re.findall(r"<!-- .* -->", text) == [f"<!-- facts: {kind} {name} -->"]
    made = facts.expand(text, ROOT)
    assert "<!--" not in made
    assert "## What was measured" in made
    assert measured.NOT_MEASURED in made or "mean and standard error" in made


def test_no_page_is_of_a_method_that_is_gone():
    for kind in KINDS:
        files = {path.stem for path in (ROOT / "docs/methods" / kind).glob("*.md")}
        assert files == {facts.page(kind, name) for name in facts.names(kind)}


def test_every_option_of_every_method_has_a_meaning():
    kinds = {type(step) for method in PTQ.values() for step in method.passes()} | {*QAT.values(), FlattenSettings}
    for kind in (kind for kind in kinds if is_dataclass(kind)):
        meanings = option_docs(kind)
        missing = [f.name for f in fields(kind) if not meanings.get(f.name) and f.name != "training"]
        assert not missing, f"{kind.__name__}: {missing}"


def test_options_have_the_values_of_the_method():
    text = facts.facts("ptq", "brecq", ROOT)
    assert "| `drop` | `0.0` |" in text
    assert "| `loss` | `'fisher'` |" in text
    assert "`~planish.ptq.reconstruction.Reconstruct`" in text
    assert "| `experts` | `4` | groups by magnitude" in facts.facts("qat", "mec", ROOT)
    law = facts.facts("flatten", "weight-uniform", ROOT)
    assert "| `weight_noise` | `'uniform'` |" in law
    assert "`activation_noise`" not in law


def test_a_figure_is_the_mean_of_the_rows():
    found = rows("ptq.csv", network="vit", arm="gptq", scheme="w3a3")
    base = {row["seed"]: float(row["top1"]) for row in rows("ptq.csv", network="vit", arm="rtn", scheme="w3a3")}
    top1 = 100 * np.array([float(row["top1"]) for row in found])
    gain = top1 - 100 * np.array([base[row["seed"]] for row in found])
    text = facts.facts("ptq", "gptq", ROOT)
    for values, sign in ((top1, ""), (gain, "+")):
        assert f"{values.mean():{sign}.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}" in text
    for name in ("qat", "gplq"), ("qat", "saq"), ("flatten", "flat"):
        assert "seed" in facts.facts(*name, ROOT)


def test_what_was_not_measured_is_said_to_be_so():
    assert measured.NOT_MEASURED in facts.facts("ptq", "glf", ROOT)
    assert "Not measured on the transformer." in facts.facts("ptq", "erq", ROOT)
    assert "± " in facts.facts("qat", "best-qat", ROOT)  # the figures of fpq


def test_sources_are_linked():
    assert facts.linked("Nagel et al. 2020, arXiv 2004.10568") == (
        "Nagel et al. 2020, [arXiv 2004.10568](https://arxiv.org/abs/2004.10568)"
    )
    assert facts.linked("docs/training.md") == "[docs/training.md](/docs/training.md)"


def test_marks_that_mean_nothing_stop_the_build():
    with pytest.raises(KeyError, match="ptq has no method best"):
        facts.expand("<!-- facts: ptq best -->", ROOT)
    with pytest.raises(ValueError, match="has nothing of glf on vit"):
        facts.expand("<!-- compare: ptq vit rtn glf -->", ROOT)
    (row,) = rows("export_latency.csv", network="vit_small_patch16_224", file="w4a4")
    cells = f"| w4a4 | {row['ms']} | {float(row['of_fp32']):.2f}x | {float(row['size_of_fp32']):.3f}x |"
    assert cells in facts.expand("<!-- latency: vit_small_patch16_224 -->", ROOT)
