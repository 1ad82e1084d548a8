"""Formulas as MathML."""

import re

import pytest

pytest.importorskip("sphinx")

from planish_docs.mathml import render


def plain(latex):
    """Without white space and name space."""
    return re.sub(r"\s*\n\s*|\sxmlns=\"[^\"]*\"", "", render(latex, block=False))


def test_the_index_of_an_accented_letter_is_beside_it():
    accented = '<mover accent="true"><mi>z</mi><mo stretchy="false">\N{MODIFIER LETTER CIRCUMFLEX ACCENT}</mo></mover>'
    assert plain(r"\hat z") == f"<math>{accented}</math>"
    assert plain(r"\hat z_l") == f"<math><msub>{accented}<mi>l</mi></msub></math>"


def test_the_limits_of_a_sum_are_not():
    assert "<munderover><mo" in render(r"\sum_{i}^{n} x_i", block=True).replace("\n", "").replace("  ", "")


def test_a_block_is_on_a_line_of_its_own():
    assert 'display="block"' in render("x", block=True)
    assert 'display="block"' not in render("x", block=False)


def test_a_command_that_is_not_known():
    from docutils.utils.math import MathError

    with pytest.raises(MathError, match="Big"):
        render(r"\Big x", block=False)
