"""The metadata of a checkpoint as JSON, and back, every value checked for its type and size.

``docs/checkpoint.md`` lists the names. What is written here says nothing about whether it fits the tensors of the file
or the architecture; :mod:`planish.deploy.packed.agreement` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planish.deploy.packed.container import DTYPES, NAMES, OLD_KEY, parse_json
from planish.deploy.packed.plan import read_plan, write_plan
from planish.deploy.packed.values import get, is_shape, make, shown
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.network import Assignment

VERSION = 1


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as codes: the site that has its grid, its own shape and dtype."""

    site: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A tensor with the same value everywhere (a folded norm, zero points), of which the file has no bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: float | int | bool


@dataclass(frozen=True)
class Head:
    """What is known of the model in a checkpoint beside its tensors.

    ``assignment`` is None for a model in float. ``rebuilt`` lists changes of structure, ``tied`` the names of
    parameters that are other parameters, by whose names they are stored.
    """

    recipe: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    protocol: dict[str, Any]
    rebuilt: list[dict[str, Any]]
    assignment: Assignment | None
    packed: dict[str, Packed]
    constant: dict[str, Constant]
    tied: dict[str, str]


def write_head(head: Head) -> str:
    """The head as JSON; numbers that are not finite become null.

    Raises:
        PlanishError: the recipe, or an argument of a change of structure, is no plain data.
    """
    plan = head.assignment
    try:
        recipe, rebuilt = (json.loads(json.dumps(part, allow_nan=False)) for part in (head.recipe, head.rebuilt))
    except (TypeError, ValueError) as error:
        raise PlanishError(f"the recipe of the architecture is no plain data: {error}") from None
    content = {
        "version": VERSION, "recipe": recipe, "preprocessing": head.preprocessing.to_dict(),
        "classes": head.classes and list(head.classes), "protocol": _plain(head.protocol), "rebuilt": rebuilt,
        "packed": {key: [p.site, NAMES[p.dtype], list(p.shape)] for key, p in head.packed.items()},
        "constant": {key: [NAMES[c.dtype], list(c.shape), c.value] for key, c in head.constant.items()},
        "tied": head.tied, "quantized": None if plan is None else write_plan(plan),
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def version_of(metadata: Mapping[str, str], key: str) -> Any:
    """The JSON of the head, once its version is known to be ours.

    Raises:
        PlanishError: the file is of another version, or its head cannot be read.
    """
    if key not in metadata and OLD_KEY in metadata:
        raise PlanishError(f"has format version 0, and this planish reads version {VERSION}: quantize the model again")
    if key not in metadata:
        raise PlanishError("holds plain weights, not a planish checkpoint: planish.load_model reads them as weights")
    content = parse_json(metadata[key])
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise PlanishError(f"has format version {shown(version)}; this planish reads version {VERSION}")
    return content


def read_head_from(content: Any) -> Head:
    """The head from its JSON.

    Raises:
        PlanishError: a value is missing, of another type than expected, or out of its bounds.
    """
    recipe, preprocessing = get(content, "recipe", dict), get(content, "preprocessing", dict)
    classes = get(content, "classes", (list, type(None)))
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise PlanishError("classes holds something else than names")
    rebuilt = get(content, "rebuilt", list)
    for note in rebuilt:
        get(note, "name", str, "rebuilt")
        get(note, "arguments", dict, "rebuilt")
    tied = get(content, "tied", dict)
    if not all(isinstance(name, str) for name in tied.values()):
        raise PlanishError("tied holds something else than names")
    quantized = get(content, "quantized", (dict, type(None)))
    return Head(
        recipe, _preprocessing(preprocessing), None if classes is None else tuple(classes),
        get(content, "protocol", dict), rebuilt, None if quantized is None else read_plan(quantized),
        {key: _packed(key, value) for key, value in get(content, "packed", dict).items()},
        {key: _constant(key, value) for key, value in get(content, "constant", dict).items()}, tied,
    )  # fmt: skip


def _preprocessing(values: dict[str, Any]) -> Preprocessing:
    where, nothing_but_numbers = "preprocessing", (int, float)
    for name in ("mean", "std"):
        for x in get(values, name, list, where):
            if not isinstance(x, nothing_but_numbers) or isinstance(x, bool) or not abs(x) < 1e9:
                raise PlanishError(f"preprocessing: {name} holds {shown(x)}, expected numbers")

    def looks(**fields: Any) -> Preprocessing:
        size = fields["input_size"]
        if not is_shape(size) or len(size) != 3 or max(size) > 2**16:
            raise PlanishError("preprocessing: input_size is no channels, height and width")
        tuples: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return Preprocessing(**tuples)

    types: dict[str, Any] = {
        "input_size": list, "mean": list, "std": list, "interpolation": str, "crop_pct": nothing_but_numbers,
        "crop_mode": str,
    }  # fmt: skip
    if "channel_order" in values:
        types["channel_order"] = str
    return make(looks, values, types, where)


def _dtype(name: Any, shape: Any, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(name, str) or name not in DTYPES or not is_shape(shape):
        raise PlanishError(f"{shown(key)} has no sound dtype and shape")
    return DTYPES[name], tuple(shape)


def _packed(key: str, value: Any) -> Packed:
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise PlanishError(f"packed: {shown(key)} has no site, dtype and shape")
    return Packed(value[0], *_dtype(value[1], value[2], key))


def _constant(key: str, value: Any) -> Constant:
    if not isinstance(value, list) or len(value) != 3:
        raise PlanishError(f"constant: {shown(key)} has no dtype, shape and value")
    dtype, shape = _dtype(value[0], value[1], key)
    number = value[2]
    kinds: Any = (int, float) if dtype.is_floating_point else bool if dtype == torch.bool else int
    if not isinstance(number, kinds) or (isinstance(number, bool) and dtype != torch.bool):
        raise PlanishError(f"constant: {shown(key)} is {shown(number)}, expected a {NAMES[dtype]}")
    limit = torch.finfo(dtype).max if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if not abs(number) <= limit:
        raise PlanishError(f"constant: {shown(key)} is {shown(number)}, too large for {NAMES[dtype]}")
    return Constant(dtype, shape, float(number) if dtype.is_floating_point else number)
