"""Plain values: whatever a run holds, as what JSON and TOML can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any


def to_plain(value: Any) -> Any:
    """Turn ``value`` into dicts with string keys, lists, strings, numbers, booleans and None.

    Dataclasses become dicts, enums their value, paths strings, one-element tensors and numpy scalars numbers, longer
    ones lists. NaN and infinities become None, since JSON has no word for them.
    """
    if isinstance(value, Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((to_plain(item) for item in value), key=str)
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and numpy scalars, without importing either
        return to_plain(value.tolist())
    return str(value) if not isinstance(value, PurePath) else value.as_posix()


def drop_none(value: Any) -> Any:
    """Leave out the None entries of nested dicts (TOML has no null)."""
    if isinstance(value, dict):
        return {key: drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_none(item) for item in value]
    return value


def flatten_keys(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat.update(flatten_keys(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def as_text(value: Any) -> str:
    """One value as a reader wants to see it; the empty string if there is nothing to see."""
    value = to_plain(value)
    if value is None or value == {} or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in value)
    return str(value)


def join(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
