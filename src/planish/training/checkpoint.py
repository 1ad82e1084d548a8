"""Checkpoints of a training run: safetensors for tensors, JSON for the rest, moved into place when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planish.errors import NotWritten, PlanishError, why_not_written
from planish.models.weights import check_own
from planish.training.ingredients import Ingredient
from planish.training.sharding import copy_into, is_split, whole

_TENSORS, _VALUES = "state.safetensors", "state.json"


def exists(directory: Path) -> bool:
    """Whether a complete checkpoint is there; one that a crash left set aside is put back."""
    old = _beside(directory, "old")
    if not directory.exists() and (old / _VALUES).is_file():
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(old, directory)
    return (directory / _VALUES).is_file()


def check_place(directory: Path | None) -> None:
    """Raise PlanishError if the folder of the checkpoint, which is replaced with every one, holds something else."""
    if directory is not None:
        check_own(directory, _TENSORS, _VALUES)


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f"{directory.name}.{suffix}")


def _to_disk(path: Path) -> None:
    """Wait until a file is on the disk: else, after a power cut, the new name may stand for an empty file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flatten_state(state: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested state into ``tensors``; what is left is JSON with references to them."""
    if isinstance(state, Tensor):
        tensors[prefix] = whole(state.detach()).to("cpu", copy=True).contiguous()
        return {"tensor": prefix}
    if isinstance(state, dict):
        return {"dict": [[k, flatten_state(v, f"{prefix}/{k}", tensors)] for k, v in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [flatten_state(v, f"{prefix}/{i}", tensors) for i, v in enumerate(state)]}
    return {"value": state}


def restore_state(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`flatten_state` (tuples come back as lists)."""
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dict" in tree:
        return {k: restore_state(v, tensors) for k, v in tree["dict"]}
    if "list" in tree:
        return [restore_state(v, tensors) for v in tree["list"]]
    return tree["value"]


def save(
    directory: Path | None,
    model: nn.Module,
    optimizer: Any,
    ingredients: Sequence[Ingredient],
    accelerator: Accelerator,
    step: int,
    *,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write everything that :func:`load` needs; only the main process writes, but all of them have to come here: what
    FSDP2 has split is put together.

    Args:
        settings: plain values without which the run cannot be continued to the same result.

    Raises:
        NotWritten: the disk is full or not writable; the previous checkpoint stays as it was.
    """
    split = any(is_split(parameter) for parameter in model.parameters())
    if directory is None or not (accelerator.is_main_process or split):
        return
    tensors: dict[str, Tensor] = {}
    scaler = getattr(optimizer, "scaler", None)  # of the losses in fp16
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "ingredients": [ingredient.state_dict() for ingredient in ingredients],
        "scaler": scaler.state_dict() if scaler is not None else None,
        "settings": dict(settings or {}),
        "step": step,
    }
    tree = flatten_state(state, "", tensors)
    if not accelerator.is_main_process:
        return
    fresh, old = _beside(directory, "new"), _beside(directory, "old")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file(tensors, fresh / _TENSORS)
        (fresh / _VALUES).write_text(json.dumps(tree))
        for name in (_TENSORS, _VALUES):
            _to_disk(fresh / name)
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.replace(directory, old)
        os.replace(fresh, directory)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise NotWritten(
            f"the checkpoint {directory} could not be written: {why_not_written(error)}; the previous one is kept"
        ) from error


def load(
    directory: Path,
    model: nn.Module,
    optimizer: Any,
    ingredients: Sequence[Ingredient],
    *,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Restore model, optimizer and ingredients in place; returns the step that was reached.

    Args:
        settings: what :func:`save` would be given now; values that both know must agree.

    Raises:
        PlanishError: the files are damaged or belong to another run.
    """
    try:
        tree = json.loads((directory / _VALUES).read_text())
        state = restore_state(tree, load_file(directory / _TENSORS))
        _check_settings(directory, state.get("settings") or {}, settings or {})
        if len(state["ingredients"]) != len(ingredients):
            raise ValueError("it was written with other ingredients")
        _load_model(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        _split_moments(optimizer)
        for ingredient, saved in zip(ingredients, state["ingredients"], strict=True):
            ingredient.load_state_dict(saved)
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        return int(state["step"])
    except PlanishError:
        raise
    except Exception as error:  # whatever is wrong with the files, the user needs one sentence
        what = " ".join(str(error).split())[:200]
        raise PlanishError(
            f"the checkpoint {directory} cannot be continued from ({type(error).__name__}: {what}); "
            f"delete it to start over"
        ) from error


def _load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    mine = model.state_dict()
    if not any(is_split(value) for value in mine.values()):
        model.load_state_dict(dict(state))
        return
    if mine.keys() != state.keys():
        raise ValueError("it was written by another network")
    for key, value in mine.items():  # which share their memory with the network
        copy_into(value, state[key])


def _split_moments(optimizer: Any) -> None:
    """Of the moments in an optimizer, which were put together, each process keeps its part."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kept = optimizer.state.get(parameter, {}) if is_split(parameter) else {}
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter, dtype=value.dtype)
                    copy_into(kept[name], value)


def _check_settings(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(dict(now)))  # as they come back from the file
    differing = [key for key in now if key in before and before[key] != now[key]]
    if differing:
        shown = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in differing[:3])
        raise PlanishError(
            f"the checkpoint {directory} was made with other settings ({shown}): give the same ones to continue it, "
            f"or delete it to start over"
        )
