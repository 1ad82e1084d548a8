"""Values that come out of a file: of the kind that is expected, and fit for a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from planish.errors import PlanishError

T = TypeVar("T")


def one_line(error: object) -> str:
    """A message without line breaks, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."


def shown(value: object) -> str:
    """A value of the file for a sentence: quoted, shortened, without characters that a terminal obeys."""
    text = ascii(value) if not isinstance(value, (list, dict)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_shape(value: Any) -> bool:
    """Whether a JSON value is a list of at most 8 whole numbers that a size may be."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in value)
    )


def get(values: Any, name: str, kind: type[T] | tuple[type, ...], where: str = "its metadata") -> Any:
    """``values[name]``, which has to be of the kind; True and False are no numbers."""
    if not isinstance(values, dict) or name not in values:
        raise PlanishError(f"{where}: {name} is missing")
    value, kinds = values[name], kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise PlanishError(f"{where}: {name} is {shown(value)}, expected {names}")
    return value


def make(kind: Callable[..., T], values: Any, types: dict[str, Any], where: str) -> T:
    """``kind`` of the values, each of its type, none missing and none unknown."""
    fields = {name: get(values, name, expected, where) for name, expected in types.items()}
    if unknown := set(values) - set(types):
        raise PlanishError(f"{where}: {shown(min(unknown))} is not known")
    return kind(**fields)
