"""torchvision's classifiers by name, with weights of the user's own or, when they are asked for, published ones."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.errors import PlanishError
from planish.models.heads import head_size, new_head
from planish.models.preprocessing import Preprocessing

PREFIX = "torchvision:"
SOURCE = "torchvision"
# Arguments by which torchvision would fetch something, or that are no plain data.
FORBIDDEN = {"weights", "weights_backbone", "progress", "pretrained", "pretrained_backbone"}

# Networks whose published weights want another normalization, which they do themselves, and that have layers which
# only their training uses.
_OLDER = ("googlenet", "inception_v3")


def split_name(name: str) -> tuple[str, str | None]:
    """``("resnet18", "DEFAULT")`` of ``"torchvision:resnet18:DEFAULT"``; None where no published weights are named.

    Raises:
        PlanishError: torchvision has no such classifier, or the name has another form.
    """
    match = re.fullmatch(r"([A-Za-z0-9_]+)(?::(\w+))?", name.removeprefix(PREFIX), re.ASCII)
    if match is None:
        raise PlanishError(f"{name!r:.80} is no name of torchvision: expected {PREFIX}NAME or {PREFIX}NAME:WEIGHTS")
    check_torchvision(match[1])
    return match[1], match[2]


def check_torchvision(architecture: Any) -> None:
    """Raise :class:`PlanishError` unless torchvision has registered a classifier of this name."""
    from torchvision import models

    known = models.list_models(module=models)
    if not isinstance(architecture, str) or architecture not in known:
        close = difflib.get_close_matches(str(architecture)[:60], known, n=3, cutoff=0.0)
        raise PlanishError(
            f"torchvision has no classifier {ascii(architecture)[:60]}: the closest are {', '.join(close)}"
        )


class _CountsOnCPU(TorchFunctionMode):
    """RegNet computes its widths with tensors, which have no values while it is built on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.arange, torch.tensor):
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


def build_torchvision(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A classifier with random weights.

    Raises:
        PlanishError: the name is not registered, or an argument would fetch something.
    """
    from torchvision import models

    check_torchvision(architecture)
    if fetching := sorted(FORBIDDEN & set(arguments)):
        raise PlanishError(f"the architecture {architecture} may not take the argument {fetching[0]!r}")
    with warnings.catch_warnings(), _CountsOnCPU() if architecture.startswith("regnet_") else nullcontext():
        warnings.simplefilter("ignore")  # about the initialization that weights replace
        model: nn.Module = models.get_model(architecture, weights=None, **arguments)
    return model


def load_torchvision(
    name: str, state: Mapping[str, Tensor] | None, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any], Preprocessing, tuple[str, ...] | None]:
    """The network of ``torchvision:NAME`` or ``torchvision:NAME:WEIGHTS``, its recipe, preprocessing and class names.

    Args:
        state: weights to come, which decide the size of the head. Without them the name has to say which published
            ones to fetch.
        num_classes: another size of the head than that of the weights gets a new head, the same for every call.

    Raises:
        PlanishError: there is no such classifier or no such weights, they are named twice or not at all, or they
            cannot be fetched.
    """
    architecture, published = split_name(name)
    if published is not None and state is not None:
        raise PlanishError(f"{name} names published weights, and others are given: leave out :{published} or these")
    if published is None and state is None:
        raise PlanishError(
            f"{name} has no weights: give --weights FILE, or {PREFIX}{architecture}:DEFAULT to fetch published ones"
        )
    entry = _entry(architecture, published or "DEFAULT")
    fetched = None if published is None else _fetched(name, entry)
    arguments = _arguments(architecture, entry, state)
    wanted = num_classes
    if state is not None and wanted is None:
        with torch.device("meta"):
            wanted = head_size(build_torchvision(architecture, arguments).state_dict(), state, 1000)
    if wanted not in (None, 1000):
        arguments["num_classes"] = wanted
    with new_head():
        model = build_torchvision(architecture, arguments)
    names = None
    if fetched is not None:
        _fill(model, fetched, name)
        names = tuple(entry.meta["categories"]) if "num_classes" not in arguments else None
    recipe = {"source": SOURCE, "architecture": architecture, "arguments": arguments}
    return model, recipe, preprocessing_of(entry.transforms()), names


def _arguments(architecture: str, entry: Any, state: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What torchvision itself passes to an architecture for these weights, where that is not the default."""
    if architecture in _OLDER:
        auxiliary = any(key.startswith(("aux", "AuxLogits")) for key in state or ())
        return {"aux_logits": auxiliary, "transform_input": state is None, "init_weights": False}
    side = entry.meta["min_size"][0] if architecture.startswith("vit_") else 224
    return {} if side == 224 or state is not None else {"image_size": side}


def _entry(architecture: str, weights: str) -> Any:
    from torchvision import models

    entries: Any = models.get_model_weights(architecture)
    if weights not in entries.__members__:
        known = ", ".join(entries.__members__)
        raise PlanishError(f"torchvision has no weights {weights!r:.60} of {architecture}: expected one of {known}")
    return entries[weights]


def _fetched(name: str, entry: Any) -> Mapping[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
                entry.url, progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:  # of urllib, of torch, and of the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanishError(
            f"the weights of {name} could not be fetched: {reason}; --weights FILE loads local ones"
        ) from error
    return state


def _fill(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Published weights, but for a head of another size, which stays as it is."""
    own = model.state_dict()
    kept = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    if len(own) - len(kept) > 2:  # weight and bias of the head
        raise PlanishError(f"the published weights of {name} do not fit what torchvision builds: update torchvision")
    model.load_state_dict(kept, strict=False)


def preprocessing_of(transforms: Any) -> Preprocessing:
    """The preprocessing of torchvision's ``ImageClassification`` transforms: resize the shorter side, crop, normalize.

    Raises:
        PlanishError: they are others.
    """
    try:
        (resized,), (cropped,) = transforms.resize_size, transforms.crop_size
        mean, std, mode = tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value
    except (AttributeError, TypeError, ValueError) as error:
        raise PlanishError(f"the transforms {type(transforms).__name__} are not those of a classifier") from error
    share = cropped / resized
    if math.floor(cropped / share) != resized:
        share = math.nextafter(share, 0)
    return Preprocessing((3, cropped, cropped), mean, std, mode, share)
