"""Image classifiers of Hugging Face's transformers: from a folder that ``save_pretrained`` wrote, or from the hub.

Everything is read from files in a folder: configuration, preprocessing and weights, the last in safetensors. What is
named by a hub name is first copied into a folder, and only files of these kinds. Code beside them is never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from planish.errors import PlanishError
from planish.models.heads import head_size, new_head
from planish.models.huggingface_config import build_huggingface, quietly, recipe_from_config, transformers_or_say
from planish.models.huggingface_images import huggingface_preprocessing
from planish.models.preprocessing import Preprocessing

PREFIX = "hf:"
CONFIG = "config.json"
FILES = [CONFIG, "preprocessor_config.json", "processor_config.json", "model.safetensors",
         "model.safetensors.index.json", "model-*-of-*.safetensors"]  # fmt: skip
_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?", re.ASCII)


@dataclass
class Classifier:
    """A network with what builds it again, what its images go through, and the names of its classes if it has any."""

    model: nn.Module
    recipe: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None


def is_huggingface(name: str) -> bool:
    """Whether a name begins with ``hf:`` or is a folder with a ``config.json``."""
    return name.startswith(PREFIX) or (Path(name).expanduser() / CONFIG).is_file()


def load_huggingface(name: str, state: Mapping[str, Tensor] | None, num_classes: int | None) -> Classifier:
    """The classifier of ``hf:NAME`` (of the hub), ``hf:FOLDER`` or a folder.

    Args:
        state: weights to come; then the folder needs none, and they decide the size of the head.
        num_classes: another size of the head than that of the weights gets a new head, the same for every call.

    Raises:
        PlanishError: transformers is missing, the folder or the hub's name is not there, it is no image classifier
            that planish knows, its weights are missing or not safetensors, or its preprocessing cannot be imitated.
    """
    transformers_or_say(f"{name} is a model of Hugging Face")
    folder = _folder(name.removeprefix(PREFIX), weights=state is None)
    config = _json(folder / CONFIG)
    recipe, classes = recipe_from_config(config, str(folder))
    preprocessing = huggingface_preprocessing(folder, recipe["arguments"].get("num_channels", 3))
    if state is not None:
        own = build_huggingface(recipe["architecture"], recipe["arguments"], meta=True).state_dict()
        wanted = num_classes or head_size(own, state, recipe["arguments"]["num_labels"])
    else:
        wanted = num_classes
    if wanted is not None and wanted != recipe["arguments"]["num_labels"]:
        recipe["arguments"]["num_labels"], classes = wanted, None
    if state is not None:
        model = build_huggingface(recipe["architecture"], recipe["arguments"])
    else:
        model = _with_weights(recipe, folder, num_classes)
    return Classifier(model, recipe, preprocessing, classes)


def _folder(name: str, *, weights: bool) -> Path:
    """The folder of a name; files of the hub are fetched into its cache."""
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise PlanishError(f"{folder} has no {CONFIG}: expected a folder that save_pretrained wrote")
        if weights and not any(folder.glob("*.safetensors")):
            raise PlanishError(
                f"{folder} has no model.safetensors: save the model again with save_pretrained "
                f"(safetensors only, a pickle is not read), or give --weights FILE"
            )
        return folder
    if not _HUB_NAME.fullmatch(name):
        raise PlanishError(f"{PREFIX}{name}: there is no such folder, and it is no name of the hub (OWNER/NAME)")
    return _fetched(name, weights)


def _fetched(name: str, weights: bool) -> Path:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES if weights else FILES[:3]))
    except Exception as error:  # its own, those of requests or httpx, and those of the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PlanishError(
            f"{PREFIX}{name} could not be fetched from the hub: {reason}; name a local folder instead"
        ) from error
    if not (folder / CONFIG).is_file() or (weights and not any(folder.glob("*.safetensors"))):
        lacking = CONFIG if not (folder / CONFIG).is_file() else "model.safetensors (a pickle is not read)"
        raise PlanishError(f"{PREFIX}{name} has no {lacking} on the hub, so planish cannot load it")
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanishError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise PlanishError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _with_weights(recipe: dict[str, Any], folder: Path, num_classes: int | None) -> nn.Module:
    """The network of a recipe with the weights of a folder, in float32; transformers renames old keys as it reads."""
    if (folder / "adapter_config.json").is_file():
        raise PlanishError(f"{folder} holds an adapter, not a whole model: merge it into its model and save that")
    built: Any = build_huggingface(recipe["architecture"], recipe["arguments"], meta=True)
    try:
        with quietly(), new_head():
            model, info = type(built).from_pretrained(
                str(folder), config=built.config, use_safetensors=True, local_files_only=True,
                ignore_mismatched_sizes=num_classes is not None, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # of transformers, safetensors and torch
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PlanishError(f"the weights in {folder} cannot be loaded: {reason}") from error
    _check_loaded(model, info, folder, num_classes)
    return model.float().eval()


def _check_loaded(model: Any, info: Mapping[str, Any], folder: Path, num_classes: int | None) -> None:
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    renewed = {entry[0] if isinstance(entry, (tuple, list)) else entry for entry in info["mismatched_keys"]}
    lacking = sorted({*info["missing_keys"], *renewed})
    if num_classes is not None:  # the head, whose tensors begin with a dimension of classes, is new
        lacking = [key for key in lacking if not shapes.get(key) or shapes[key][0] != num_classes]
    if lacking:
        raise PlanishError(
            f"{folder}: its weights lack {lacking[0]} ({len(lacking)} tensors), so this is no trained classifier; "
            f"num_classes=N gives a network without a head a new one"
        )
    if left := sorted(info.get("error_msgs", ())):
        raise PlanishError(f"{folder}: {' '.join(str(left[0]).split())[:300]}")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise PlanishError(f"{folder} holds NaN in {key}")
