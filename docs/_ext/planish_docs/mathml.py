"""Formulas as MathML, which browsers draw themselves: no script, no font, no request."""

from __future__ import annotations

import html
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)


def render(latex: str, *, block: bool) -> str:
    """A formula in LaTeX's notation as a ``<math>`` element; docutils raises ``MathError`` for what it cannot read."""
    return latex2mathml.tex2mathml(latex, as_block=block)


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
