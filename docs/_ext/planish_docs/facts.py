"""The part of a method's page that is not written by hand: what was measured, the options, the source.

A page says ``<!-- facts: ptq gptq -->`` where this belongs; on a code host, which shows the page as it is, the comment
is not seen. ``<!-- methods: ptq -->`` stands for a table of all methods of a kind,
``<!-- compare: ptq vit rtn fast -->`` for measured figures of some of them, ``<!-- latency: NETWORK -->`` for those of
exported files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from planish.flattening import FlattenSettings
from planish.flattening.activation_noise import KINDS as ACTIVATION_KINDS
from planish.flattening.weight_noise import KINDS as WEIGHT_KINDS
from planish.ptq import METHODS as PTQ
from planish.ptq.assign_bits import AssignBits
from planish.qat import METHODS as QAT
from planish.qat.options import option_docs
from planish.recipes.arms import ARMS
from planish_docs import measured
from planish_docs.tables import grid

MARK = re.compile(r"^<!-- (facts|methods|compare|latency): (.+) -->$", re.MULTILINE)
# passes that no method holds, with the option that brings them in
LOOSE: dict[str, tuple[type, str, str]] = {
    "assign-bits": (
        AssignBits,
        "bits of each layer chosen within a budget (`--budget`)",
        "HAWQ-V3, Yao et al. 2021, arXiv 2011.10680; Hubara et al. 2020, arXiv 2006.10518",
    ),
}
# the fields of FlattenSettings that are the options of a law of noise or of an arm
_SHARED = ("start", "until", "share", "refresh")
_LAWS = {
    "weight": ("weight_noise", "weight_gain", "clip_weights", *_SHARED),
    "weight-residual": ("weight_noise", "weight_gain", "part", "clip_weights", *_SHARED),
    "activation": ("activation_noise", "activation_gain", "clip_activations", "nonzero_only", *_SHARED),
    "activation-residual": ("activation_noise", "activation_part", "clip_activations", *_SHARED),
    "averaged": ("averaging", "equal_averaging", "averaging_start"),
    "sam": ("sam", "adaptive_sam"),
    "flat": tuple(f.name for f in fields(FlattenSettings)),
}


def names(kind: str) -> dict[str, tuple[str, str]]:
    """The methods of a kind: name -> what it does in a few words, and its source.

    Args:
        kind: ``ptq``, ``qat`` or ``flatten``.
    """
    if kind == "ptq":
        loose = {name: (summary, paper) for name, (_, summary, paper) in LOOSE.items()}
        return {name: (m.summary, m.paper) for name, m in PTQ.items()} | loose
    if kind == "qat":
        return {name: (m.summary, m.paper) for name, m in QAT.items()}
    if kind == "flatten":
        laws = {
            f"{prefix}-{name}": (text, "")
            for prefix, kinds in (("weight", WEIGHT_KINDS), ("activation", ACTIVATION_KINDS))
            for name, text in kinds.items()
            if name != "none"
        }
        return {arm.name: (arm.summary, arm.paper) for arm in ARMS.values()} | laws
    raise KeyError(f"{kind} is no kind of method: ptq, qat or flatten")


def page(kind: str, name: str) -> str:
    """The file of a method's page in its folder, without the suffix."""
    return name.replace("+", "-plus")


def expand(text: str, root: Path) -> str:
    """The text of a page with its marks replaced.

    Args:
        text: Markdown.
        root: the repository.

    Raises:
        KeyError: a mark names no method.
    """
    return MARK.sub(lambda m: _replaced(m[1], m[2].split(), root), text)


def _replaced(mark: str, words: list[str], root: Path) -> str:
    if mark == "facts":
        return facts(*words, root)
    if mark == "compare":
        return measured.compare(words[0], words[1], words[2:], root)
    return measured.latency(*words, root) if mark == "latency" else listing(*words)


def listing(kind: str) -> str:
    """A table of the methods of a kind, with links to their pages."""
    rows = [(f"[{name}]({kind}/{page(kind, name)}.md)", *about) for name, about in names(kind).items()]
    return grid(("", "what it does", "source"), rows)


def facts(kind: str, name: str, root: Path) -> str:
    """What was measured, the options, the source."""
    if name not in names(kind):
        raise KeyError(f"{kind} has no method {name}")
    gains: Callable[[str, Path], str] = {"ptq": measured.ptq, "qat": measured.qat, "flatten": measured.study}[kind]
    parts = [f"## What was measured\n\n{gains(name, root)}"]
    options = {"ptq": _ptq_options, "qat": _qat_options, "flatten": _flatten_options}[kind](name)
    if options:
        parts.append(f"## Options\n\n{options}")
    source = names(kind)[name][1]
    if source:
        parts.append(f"## Source\n\n{linked(source)}")
    return "\n\n".join(parts)


def linked(source: str) -> str:
    """With links for arXiv numbers and for pages of the documentation."""
    source = re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return re.sub(r"\bdocs/(\w+\.md)", r"[docs/\1](/docs/\1)", source)


def _ptq_options(name: str) -> str:
    if name in LOOSE:
        kind = LOOSE[name][0]
        return f"{_reference(kind)}\n\n{_options(kind, fields(kind), lambda f: f.default)}"
    parts = ["The passes, in this order; `with_settings(passes, OPTION=VALUE)` changes them in Python."]
    for step in PTQ[name].passes():
        known = fields(step) if is_dataclass(step) else ()
        parts.append(_reference(type(step)) + ("" if known else ": no options."))
        if known:
            parts.append(_options(type(step), known, lambda f, step=step: getattr(step, f.name)))
    return "\n\n".join(parts)


def _qat_options(name: str) -> str:
    text = f"{_reference(QAT[name])}; on the command line `--option NAME=VALUE`."
    return f"{text}\n\n{_options(QAT[name], fields(QAT[name]), lambda f: f.default)}"


def _flatten_options(name: str) -> str:
    wanted = _LAWS.get(name) or _LAWS.get(name.partition("-")[0], ())
    if not wanted:
        return ""
    law, _, kind = name.partition("-")
    chosen = {"weight_noise": kind} if law == "weight" else {"activation_noise": kind} if law == "activation" else {}
    known = [f for f in fields(FlattenSettings) if f.name in wanted]
    text = f"{_reference(FlattenSettings)}, the argument `settings` of {{func}}`~planish.flattening.recipe.flatten`."
    return f"{text}\n\n{_options(FlattenSettings, known, lambda f: chosen.get(f.name, f.default))}"


def _options(kind: type, known: Iterable[Field[Any]], value: Callable[[Field[Any]], Any]) -> str:
    meanings = option_docs(kind)
    rows = []
    for f in known:
        found = value(f)
        shown = "" if found is MISSING else f"`{found!r}`"
        rows.append((f"`{f.name}`", shown, _plain(meanings.get(f.name, ""))))
    return grid(("option", "value", "meaning"), rows)


def _plain(text: str) -> str:
    """A docstring's cross references as plain names, and nothing that Markdown would take for markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text).replace("`", "")
    return re.sub(r"([*_\[\]<$])", r"\\\1", text)


def _reference(kind: type) -> str:
    return f"{{class}}`~{kind.__module__}.{kind.__qualname__}`"
