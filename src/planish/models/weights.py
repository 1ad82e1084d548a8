"""Weights on disk: reading what others saved, fitting it to a model, writing safetensors whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import NotWritten, PlanishError, why_not_written
from planish.network.taps import CHILD

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel and torch.compile


def read_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint by key, and its metadata (safetensors only, else empty).

    Reads safetensors and torch files; the latter with ``weights_only=True``, so that no code in them is run. A dict
    under ``"state_dict"`` or ``"model"`` is unwrapped, a prefix ``module.`` or ``_orig_mod.`` of all keys removed.

    Raises:
        PlanishError: when the file is missing, truncated, no checkpoint, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise PlanishError(f"the weights {path} are {'a folder, not a file' if path.is_dir() else 'not there'}")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        # a safetensors file begins with the length of its header, which may look like anything, and then has a brace
        if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its arguments
                return _unwrap(torch.load(path, map_location="cpu", weights_only=True), path), {}
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            state = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118
            return state, dict(archive.metadata() or {})
    except PlanishError:
        raise
    except pickle.UnpicklingError as error:
        raise PlanishError(
            f"{path} is damaged or holds Python objects beside tensors, which are not loaded because they can run "
            "code: save model.state_dict() alone"
        ) from error
    except Exception as error:  # both readers raise their own kinds for truncated and foreign files
        raise PlanishError(
            f"{path} is not a readable checkpoint (expected safetensors or a torch file; is it complete?): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise PlanishError(
            f"{path} holds no state_dict: expected tensors by key, or these under 'state_dict' or 'model', "
            f"found {_describe(content)}"
        )
    state = dict(content)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "a dict with " + (", ".join(repr(key) for key in list(content)[:4]) or "no keys")
    return f"a {type(content).__name__}"


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], *, name: str, source: Path | str) -> None:
    """Load ``state`` strictly into ``model``.

    Raises:
        PlanishError: when keys or shapes differ, with the first three differences, or when a value is NaN.
    """
    own = model.state_dict()
    differing = [f"{key} is missing" for key in own if key not in state]
    differing += [f"{key} is unexpected" for key in state if key not in own]
    differing += [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if any(f"{CHILD}." in key for key in state) and not any(f"{CHILD}." in key for key in own):
        raise PlanishError(
            f"{source} holds a quantized model, and weights in float are due here: give the file of the network "
            "that it was made from"
        )
    if differing:
        raise PlanishError(
            f"{source} does not fit {name}: {len(differing)} keys differ ({'; '.join(differing[:3])}); "
            "is it a checkpoint of another architecture or number of classes?"
        )
    if broken := [key for key, value in state.items() if value.is_floating_point() and bool(value.isnan().any())]:
        raise PlanishError(f"{source} holds NaN in {broken[0]} ({len(broken)} tensors): the checkpoint is not usable")
    model.load_state_dict(dict(state), strict=True)


def state_hash(model: nn.Module) -> str:
    """16 hex digits of the sha256 over all names, types, shapes and bytes of the state_dict, in the order of the keys.

    Independent of the device and of the memory layout.
    """
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # a module's get_extra_state
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state_dict as safetensors, under a temporary name that is moved into place when it is complete.

    Tied tensors are written once for each of their keys, non-contiguous ones contiguous.

    Raises:
        NotWritten: when the file cannot be written (full disk, missing folder, no permission); what was at ``path``
            is then still there.
    """
    from safetensors.torch import save

    path = Path(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors, seen = {}, set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    write_whole(path, save(tensors, dict(metadata) if metadata else None))


def check_own(folder: Path, *patterns: str) -> None:
    """Raise PlanishError if a folder whose content will be replaced holds files of other names than the patterns'."""
    if not folder.is_dir():
        return
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    foreign = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise PlanishError(
            f"{folder} holds what is no checkpoint ({foreign[0]}{more}) and would be lost: give a folder of its own"
        )


def write_whole(path: Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Write a file under a temporary name, which is moved into place when it is complete and ``check`` has passed.

    Raises:
        NotWritten: when the file cannot be written (full disk, missing folder, no permission); what was at ``path``
            is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # "x": never through a link that another user has put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise NotWritten(f"{path} could not be written: {why_not_written(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
