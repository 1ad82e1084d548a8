"""Formulas as MathML, which browsers draw themselves: no script, no font, no request."""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)
_MATHML = "http://www.w3.org/1998/Math/MathML"
_ACCENTS = ("\N{MODIFIER LETTER CIRCUMFLEX ACCENT}", "\N{SMALL TILDE}", "\N{MACRON}", "~")
ElementTree.register_namespace("", _MATHML)


def render(latex: str, *, block: bool) -> str:
    """A formula in LaTeX's notation as a ``<math>`` element; docutils raises ``MathError`` for what it cannot read."""
    text = latex2mathml.tex2mathml(latex, as_block=block)
    text = re.sub(r"&(?!(lt|gt|amp|quot);)\w+;", lambda m: html.unescape(m[0]), text)  # names that XML has not
    root = ElementTree.fromstring(text)
    for element in list(root.iter(f"{{{_MATHML}}}munderover")):
        _index_beside(element)
    return ElementTree.tostring(root, encoding="unicode")


def _index_beside(element: ElementTree.Element) -> None:
    """docutils puts the index of an accented letter below it, as that of a sum; here it goes to the right."""
    base, index, accent = element
    if accent.text not in _ACCENTS:
        return
    over = ElementTree.Element(f"{{{_MATHML}}}mover", accent="true")
    over.extend([base, accent])
    element.tag = f"{{{_MATHML}}}msub"
    element[:] = [over, index]


def visit(writer: Any, node: nodes.Element) -> None:
    """Write an inline formula or one on a line of its own."""
    block = isinstance(node, nodes.math_block)
    try:
        text = render(node.astext(), block=block)
    except MathError as error:
        _LOGGER.warning("formula %r: %s", node.astext(), error, location=node)
        text = html.escape(node.astext())
    writer.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode
