"""Where a model comes from: the recipe of its architecture and its preprocessing, as far as the model tells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.models.foreign import foreign_preprocessing, split_file_name
from planish.models.huggingface_config import recipe_of
from planish.models.load import SOURCES
from planish.models.preprocessing import timm_preprocessing
from planish.models.torchvision_models import PREFIX as TORCHVISION


def find_preprocessing(model: nn.Module, given: Preprocessing | None) -> Preprocessing:
    """What was given, else what :func:`planish.load_model` has left in the model, else what a timm model asks for."""
    if given is not None:
        return given
    if getattr(model, "planish_preprocessing", None) is None and hasattr(model, "pretrained_cfg"):
        return timm_preprocessing(model)
    return foreign_preprocessing(model)


def find_classes(model: nn.Module, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the classes that were given, else the model's own, also those of a transformers configuration."""
    names = getattr(model, "planish_classes", None) if given is None else given
    if names is None and (of_transformers := recipe_of(model)) is not None:
        names = of_transformers[1]
    return None if names is None else tuple(str(name) for name in names)


def find_recipes(model: nn.Module, given: Mapping[str, Any] | str | None) -> list[dict[str, Any]]:
    """Recipes that may build the model, the likeliest first; only the given one, if there is one.

    Raises:
        PlanishError: the given one is none.
    """
    if given is not None:
        return [plain_recipe(given)]
    found: list[dict[str, Any]] = []
    own: Any = getattr(model, "planish_recipe", None)
    if own is not None:
        found.append(plain_recipe(own))
        if own.get("source") == "file":
            return found
    elif (of_transformers := recipe_of(model)) is not None:
        found.append(of_transformers[0])
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    if isinstance(name, str):
        found += [_timm(name, arguments) for arguments in _arguments(model)]
    return found


def plain_recipe(recipe: Mapping[str, Any] | str) -> dict[str, Any]:
    """A recipe as JSON gives it back: a name becomes a dict, tuples become lists.

    Raises:
        PlanishError: it holds something that is no plain data, or has no source.
    """
    if isinstance(recipe, str):
        file = split_file_name(recipe)
        if file is None and recipe.startswith(TORCHVISION):
            return {"source": "torchvision", "architecture": recipe.removeprefix(TORCHVISION), "arguments": {}}
        if file is None:
            return _timm(recipe, {})
        return {"source": "file", "path": str(file[0].resolve()), "function": file[1]}
    try:
        plain = json.loads(json.dumps(dict(recipe), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PlanishError(f"the recipe of the architecture is no plain data: {error}") from None
    if plain.get("source") not in SOURCES:
        raise PlanishError(f"the recipe's source is {plain.get('source')!r}, expected one of {', '.join(SOURCES)}")
    return plain


def _timm(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"source": "timm", "architecture": name, "arguments": arguments}


def _arguments(model: Any) -> list[dict[str, Any]]:
    """Arguments that may have been given to timm: those that it has kept, then what the model's parts tell."""
    classes = getattr(model, "num_classes", None)
    head = {"num_classes": classes} if isinstance(classes, int) else {}
    first = next((p for p in model.parameters() if p.dim() == 4), None)
    channels = {} if first is None else {"in_chans": first.shape[1]}
    images = {}
    for name in ("img_size", "patch_size"):
        size = getattr(getattr(model, "patch_embed", None), name, None)
        if isinstance(size, (tuple, list)):
            images[name] = list(size)
    guesses: list[dict[str, Any]] = []
    try:
        kept = json.loads(json.dumps(getattr(model, "_model_args", None) or {}))
        guesses += [kept, {**kept, **head}]
    except (TypeError, ValueError):  # a class of norms, say
        pass
    guesses += [head, {**head, **channels}, {**head, **channels, **images}]
    return [guess for i, guess in enumerate(guesses) if guess not in guesses[:i]]
