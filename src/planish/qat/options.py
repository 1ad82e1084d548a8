"""The options of a training method as text: read from the command line, shown in a protocol."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from planish.errors import PlanishError
from planish.qat.method import Method

_KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float}


def with_options(method: Method, texts: Iterable[str]) -> Method:
    """The method with ``NAME=VALUE`` texts laid over its options; a value is read as the type of its field.

    Raises:
        PlanishError: there is no such option, or the value is of another type.
    """
    known = {f.name: getattr(method, f.name) for f in fields(method)}
    changes: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not separator:
            raise PlanishError(
                f"option {text!r} is not understood: write NAME=VALUE, such as {next(iter(known))}=..., "
                f"with a name among {', '.join(known)}"
            )
        if name not in known:
            raise PlanishError(f"{method.name} has no option {name!r}: its options are {', '.join(known)}")
        changes[name] = _read(method, name, value.strip(), known[name])
    return replace(method, **changes)


def _read(method: Method, name: str, value: str, default: Any) -> Any:
    annotation = _annotation(method, name)
    kind = type(default) if default is not None else _KINDS.get(annotation.partition(" |")[0], str)
    if value.lower() in ("none", "null") and "None" in annotation:
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[value.lower()]
        if kind in (int, float):
            number = float(value)
            if not math.isfinite(number) or (kind is int and number != int(number)):
                raise ValueError(value)
            return int(number) if kind is int else number
        return value
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise PlanishError(f"option {name} of {method.name} is {value!r}: give {expected}") from None


def _annotation(method: Method, name: str) -> str:
    return next(str(f.type) for f in fields(method) if f.name == name)


def changed_options(method: Method) -> dict[str, Any]:
    """The options of a method that are not the defaults of its class."""
    return {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}


def option_docs(method: type[Method]) -> dict[str, str]:
    """What the docstrings of a method and its bases say of each option (their sections "Attributes")."""
    documented: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        text = inspect.getdoc(cls) or ""
        _, _, section = text.partition("Attributes:\n")
        for names, meaning in re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", section, re.MULTILINE):
            for name in names.split(", "):
                documented[name] = " ".join(meaning.split()).replace("``", "")
    return documented
