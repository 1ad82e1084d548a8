"""The demo's page as text, and the policy under which nothing but the page itself runs."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files

from planish.deploy.classify import Classifier
from planish.deploy.comparison import ROUNDS, names, size_text


def render(classifiers: Sequence[Classifier], limit: int) -> str:
    """The page; everything that comes from a model's card is escaped.

    Args:
        limit: the most bytes that a picture's file may have.
    """
    from jinja2 import Environment

    template = files("planish.deploy").joinpath("templates/demo.html.j2").read_text(encoding="utf-8")
    networks = dict.fromkeys(classifier.card.name for classifier in classifiers)
    asked = "both models say" if len(classifiers) > 1 else "the model says"
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        title=f"planish: {', '.join(networks)}",
        invitation=f"Give a picture, and see what {asked}.",
        models=[
            {"name": name, "file": c.path.name, "size": size_text(c.size)}
            for name, c in zip(names(classifiers), classifiers, strict=True)
        ],
        limit=limit,
        limit_text=size_text(limit),
        classes=len(classifiers[0].card.classes),
        rounds=ROUNDS,
    )


def content_policy(page: str) -> str:
    """A Content-Security-Policy that lets the page's own style and script run, by their hashes, and nothing else."""
    hashes = {}
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
