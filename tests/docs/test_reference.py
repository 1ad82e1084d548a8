"""The API reference knows every module and every public name."""

from pathlib import Path

import pytest
from planish_docs import only_present, reference

import planish

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_every_package_below_the_recipes_is_in_the_reference():
    marks = [found[1] for page in (DOCS / "api").glob("*.md") for found in reference.MARK.findall(page.read_text())]
    told = {module for mark in marks for name in mark.split() for module in reference.modules(name)}
    everything = set(reference.modules("planish")) - {"planish.__main__"}
    missing = {name for name in everything - told if name.split(".")[1] not in ("cli", "recipes", "report")}
    assert missing == set()


def test_the_table_of_public_names():
    text = reference.expand("<!-- public -->")
    for name in planish.__all__:
        assert name.startswith("_") or f"`planish.{name} <planish." in text


def test_where_a_short_name_leads():
    assert reference.where("planish.quantize") == "planish.ptq.quantize.quantize"
    assert reference.where("planish.training.train") == "planish.training.loop.train"
    assert reference.where("planish.qat.train_quantized") == "planish.qat.recipe.train_quantized"
    assert reference.where("planish.nothing") is None
    assert reference.where("nothing.at.all") is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("the norm |g| of g", r"the norm \|g\| of g"),
        ("``|g|`` and `|g|`", "``|g|`` and `|g|`"),
        ("*shape of x", r"\*shape of x"),
        ("the *rounded* layers", "the *rounded* layers"),
        ("* an entry\n* a * b", "* an entry\n* a \\* b"),
        (r"done \| already", r"done \| already"),
    ],
)
def test_signs_that_are_no_markup(given, wanted):
    lines = given.split("\n")
    reference.plain_signs(None, "function", "f", None, None, lines)
    assert lines == wanted.split("\n")


def test_entries_whose_page_is_not_there_are_left_out(tmp_path):
    (tmp_path / "here.md").write_text("# Here\n")
    assert only_present("first\nhere?\nabsent?\nIs it?\n", tmp_path) == "first\nhere\nIs it?\n"
