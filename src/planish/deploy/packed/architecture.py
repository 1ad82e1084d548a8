"""Architectures that a checkpoint may name, and what tensors they have, found out without allocating any.

A recipe comes from a file that may be hostile: it may name one of timm's or torchvision's registered architectures or
an image classifier of transformers with plain arguments, or a Python file, whose code is run only when the caller
trusts it. The others are first built on the meta device, where tensors have shapes and no memory, with a limit on the
work of building them.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.deploy.packed.values import one_line, shown
from planish.errors import PlanishError
from planish.models import build
from planish.models.huggingface_config import check_huggingface
from planish.models.torchvision_models import FORBIDDEN as FETCHING
from planish.models.torchvision_models import check_torchvision
from planish.network.rebuilding import rebuild
from planish.network.taps import CHILD

Shape = tuple[torch.dtype, tuple[int, ...]]

# Arguments by which timm would load something, choose a place, or give back something else than the classifier.
FORBIDDEN = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_custom_load",
    "pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir", "scriptable", "exportable",
    "no_jit", "features_only", "feature_cls", "feature_cfg", "device", "dtype", "kwargs_filter", "model_cls", *FETCHING,
}  # fmt: skip
LARGEST = {"num_classes": 10_000_000, "num_labels": 1_000_000}
MOST, MOST_WINDOW, MOST_VALUES = 16_384, 256, 256  # of one number, of a window's side, of values in all arguments
WORK, WORK_PER_TENSOR = 300_000, 15_000  # calls of functions while an architecture is built; timm's need up to 7,000
UNSTORED = 64 * 2**20  # bytes of buffers that a file does not hold (tables of indices), beside as many as of tensors


@dataclass(frozen=True)
class Layout:
    """What a model is made of: its parameters and persistent buffers, without taps, and what could be added to it.

    ``parameters`` are the names among ``tensors`` that a module multiplies with or adds; ``biases`` gives the length
    of the bias that a layer without one would have; ``modules`` are the paths of all modules.
    """

    tensors: Mapping[str, Shape]
    parameters: frozenset[str]
    biases: Mapping[str, int]
    modules: frozenset[str]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Parameters and persistent buffers under all their names, without taps; True marks a parameter."""
    for path, module in model.named_modules(remove_duplicate=False):
        if CHILD in path.split("."):
            continue
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, False


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model, on any device."""
    tensors, parameters, biases = {}, set(), {}
    for key, tensor, is_parameter in named_tensors(model):
        tensors[key] = (tensor.dtype, tuple(tensor.shape))
        if is_parameter:
            parameters.add(key)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        width: Any = getattr(module, "out_channels", getattr(module, "out_features", None))
        if module._parameters.get("bias", 0) is None and isinstance(width, int):
            biases[f"{path}.bias" if path else "bias"] = width
    return Layout(tensors, frozenset(parameters), biases, frozenset(modules))


def check_recipe(recipe: Mapping[str, Any]) -> None:
    """Raise :class:`PlanishError` unless the recipe names a known architecture with plain arguments.

    Known are what timm and torchvision have registered, and image classifiers of transformers.
    """
    name, arguments = recipe.get("architecture"), recipe.get("arguments")
    check = _CHECKS.get(recipe["source"]) if isinstance(recipe.get("source"), str) else None
    if set(recipe) != {"source", "architecture", "arguments"} or check is None:
        sources = ", ".join(_CHECKS)
        raise PlanishError(f"its recipe is none: expected source ({sources}), architecture and arguments, or a file")
    if not isinstance(arguments, dict):
        raise PlanishError(f"the arguments of its architecture are {shown(arguments)}, expected values by name")
    for key, value in arguments.items():
        if not key.isidentifier() or len(key) > 60 or key in FORBIDDEN or key.startswith("_"):
            raise PlanishError(f"its architecture may not take the argument {shown(key)}")
        _check_argument(key, value, depth=0)
    if len(list(_leaves(arguments))) > MOST_VALUES:
        raise PlanishError(f"the arguments of its architecture have more than {MOST_VALUES} values")
    check(name, arguments)


def _check_timm(name: Any, arguments: Mapping[str, Any]) -> None:
    import timm

    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,80}(\.[A-Za-z0-9_\-]{1,80})?", name):
        raise PlanishError(f"its architecture is {shown(name)}, expected the name of one that timm has registered")
    if not timm.is_model(name.partition(".")[0]):
        raise PlanishError(f"its architecture {shown(name)} is not registered in timm {timm.__version__}")


def _check_torchvision(name: Any, arguments: Mapping[str, Any]) -> None:
    try:
        check_torchvision(name)
    except PlanishError as error:
        raise PlanishError(f"its architecture is not there: {error}") from None


_CHECKS = {"timm": _check_timm, "hf": check_huggingface, "torchvision": _check_torchvision}


def _check_argument(key: str, value: Any, depth: int) -> None:
    most = LARGEST.get(key, MOST_WINDOW if "window" in key else MOST)
    if isinstance(value, (list, tuple)) and depth < 4:
        for item in value:
            _check_argument(key, item, depth + 1)
        fits = sum(x for x in _leaves(value) if isinstance(x, (int, float))) <= 4 * most
    elif isinstance(value, dict) and depth < 4:
        for name, item in value.items():
            _check_argument(name, item, depth + 1)
        fits = all(name not in FORBIDDEN for name in value)
    elif isinstance(value, str):
        fits = len(value) <= 80 and re.fullmatch(r"[\w ,.+\-]*", value) is not None  # no paths, no addresses
    else:
        fits = value is None or (isinstance(value, (int, float)) and abs(value) <= most)
    if not fits:
        raise PlanishError(f"the argument {shown(key)} of its architecture is {shown(value)}, which is not accepted")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def recipe_layout(recipe: Mapping[str, Any], rebuilt: list[dict[str, Any]], tensors: int) -> Layout:
    """The layout of a checked recipe, changed as ``rebuilt`` says; nothing is allocated.

    Args:
        tensors: how many the file has; the work of building grows with it.

    Raises:
        PlanishError: it cannot be built, has far more parts than the file, or needs large tables beside its tensors.
    """
    return _recipe_layout(json.dumps([recipe, rebuilt], sort_keys=True), WORK + WORK_PER_TENSOR * tensors)


@functools.lru_cache(maxsize=16)
def _recipe_layout(text: str, work: int) -> Layout:
    recipe, rebuilt = json.loads(text)
    try:
        # no random numbers are drawn on the meta device
        with torch.device("meta"), torch.no_grad(), limited(work):
            model = built(recipe, rebuilt)
            _check_unstored(model)
            return layout_of(model)
    except RuntimeError as error:
        # stopped while PyTorch had taken the device off its stack for a moment: it does not find it there to take off
        if isinstance(error.__context__, PlanishError):
            raise error.__context__ from None
        raise


def _check_unstored(model: nn.Module) -> None:
    """Buffers that are computed, not stored, are allocated with the network, so that they must not be large."""
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    unstored = sum(
        buffer.numel() * buffer.element_size()
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    )
    if unstored > UNSTORED + (stored - unstored):
        raise PlanishError(f"its architecture has {unstored} bytes of tables beside {stored - unstored} of tensors")


def built(recipe: Mapping[str, Any], rebuilt: list[dict[str, Any]], *, trust: bool = False) -> nn.Module:
    """The model of a recipe, changed as ``rebuilt`` says; the random numbers of the caller stay as they are.

    Raises:
        PlanishError: it cannot be built.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            model = build(recipe, trust=trust).eval()
            rebuild(model, rebuilt)
    except PlanishError:
        raise
    except Exception as error:  # each architecture raises its own about arguments that it does not take
        name = shown(recipe.get("architecture", recipe.get("path")))
        raise PlanishError(f"its architecture {name} cannot be built: {one_line(error)}") from None
    return model


@contextmanager
def limited(calls: int) -> Iterator[None]:
    """Stop what runs inside after so many calls of functions, also inside a loop that only calls built-in ones.

    Raises:
        PlanishError: they were more.
    """
    before, left = sys.getprofile(), calls

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMuch

    sys.setprofile(count)
    try:
        yield
    except _TooMuch:
        raise PlanishError("its architecture has far more parts than the file has tensors") from None
    finally:
        sys.setprofile(before)


class _TooMuch(BaseException):
    """No ``except Exception`` on the way stops it."""
