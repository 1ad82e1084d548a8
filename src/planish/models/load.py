"""A model by name: embedded, of timm, Hugging Face or torchvision, or from a Python file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.models.embedded import EMBEDDED_MODELS, build_embedded, card, embedded_preprocessing, embedded_state
from planish.models.foreign import build_from_file, foreign_preprocessing, split_file_name
from planish.models.heads import new_head
from planish.models.huggingface import is_huggingface, load_huggingface
from planish.models.huggingface_config import build_huggingface
from planish.models.preprocessing import Preprocessing, timm_preprocessing
from planish.models.torchvision_models import PREFIX as TORCHVISION
from planish.models.torchvision_models import build_torchvision, load_torchvision
from planish.models.weights import fit_weights, read_weights, state_hash
from planish.network.batches import logits_of
from planish.task import FEATURES, LABELS, Task, say_task, task_of

if TYPE_CHECKING:
    from planish.data import ImageData

_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
SOURCES = ("timm", "hf", "torchvision", "file")  # of a recipe
KINDS = (
    "vit or convnet (embedded), a timm name, hf:NAME or a folder that save_pretrained wrote (Hugging Face), "
    "torchvision:NAME, or file.py:function"
)


@dataclass
class LoadedModel:
    """A model and what must be known of it; ``recipe`` is what :func:`build` makes the same architecture from."""

    model: nn.Module
    name: str
    preprocessing: Preprocessing
    weights_hash: str
    recipe: dict[str, Any]


def load_model(
    name: str = "vit", *, weights: Path | str | None = None, num_classes: int | None = None, trust: bool = False
) -> LoadedModel:
    """Load a model by name, in evaluation mode.

    Args:
        name: ``"vit"`` or ``"convnet"`` (embedded); a timm name; ``"hf:OWNER/NAME"`` (Hugging Face's hub),
            ``"hf:FOLDER"`` or a folder that ``save_pretrained`` wrote; ``"torchvision:NAME"``, or
            ``"torchvision:NAME:DEFAULT"`` for published weights; ``"path/file.py:function"``.
        weights: a safetensors or torch checkpoint of this architecture. Without it an embedded network and a folder
            have their own weights, a name of timm or of the hub its published ones (downloaded), a model from a file
            what its function gave it.
        num_classes: size of the head. Default: what the checkpoint has. Another one than the pretrained weights' gets
            a new head, the same for every call. 0 takes the head off (networks of timm): the outputs are features, as
            the attribute ``planish_task`` then says.
        trust: whether code in a named Python file may be run.

    Raises:
        PlanishError: for an unknown name, weights that cannot be had or do not fit, or a file that builds no model.
    """
    if num_classes is not None and num_classes < 0:
        raise PlanishError(
            f"num_classes is {num_classes}: give the number of outputs, or 0 for features without a head"
        )
    headless, num_classes = num_classes == 0, num_classes or None
    state = None if weights is None else read_weights(weights)[0]
    classes: tuple[str, ...] | None = None
    if (file := split_file_name(name)) is not None:
        recipe: dict[str, Any] = {"source": "file", "path": str(file[0].resolve()), "function": file[1]}
        model = build(recipe, trust=trust)
        preprocessing = foreign_preprocessing(model)
    elif name in EMBEDDED_MODELS:
        model, recipe = _embedded(name, state, num_classes)
        preprocessing = embedded_preprocessing(card(name))
    elif is_huggingface(name):
        found = load_huggingface(name, state, num_classes)
        model, recipe, preprocessing, classes = found.model, found.recipe, found.preprocessing, found.classes
    elif name.startswith(TORCHVISION):
        model, recipe, preprocessing, classes = load_torchvision(name, state, num_classes)
    else:
        model, recipe = _from_timm(name, state, num_classes)
        preprocessing = timm_preprocessing(model)
    if state is not None:
        fit_weights(model, state, name=name, source=str(weights))
    if headless:
        _take_off_head(model, name, recipe)
    # copies keep attributes, so planish.save finds them in whatever is made of the model
    model.planish_recipe, model.planish_preprocessing = recipe, preprocessing  # type: ignore[assignment]
    if classes is not None:
        model.planish_classes = classes  # type: ignore[assignment]
    return LoadedModel(model.eval(), name, preprocessing, state_hash(model), recipe)


def build(recipe: Mapping[str, Any], *, trust: bool = False) -> nn.Module:
    """The architecture of a recipe, with random weights (or what a file's function gives it).

    Raises:
        PlanishError: for a recipe that is not understood, or one that would run a Python file without ``trust``.
    """
    import timm

    source = recipe.get("source")
    if source == "file":
        path, function = Path(str(recipe["path"])), str(recipe["function"])
        if not trust:
            raise PlanishError(
                f"{path.name}:{function} would run the Python code in {path}: allow it with trust=True if you trust it"
            )
        return build_from_file(path, function)
    if source == "timm":
        return timm.create_model(recipe["architecture"], pretrained=False, **recipe["arguments"])
    if source == "hf":
        return build_huggingface(recipe["architecture"], recipe["arguments"])
    if source == "torchvision":
        return build_torchvision(recipe["architecture"], recipe["arguments"])
    raise PlanishError(f"a model of the source {source!r} cannot be built: expected one of {', '.join(SOURCES)}")


def _embedded(
    name: str, state: Mapping[str, Tensor] | None, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    values = card(name)
    model = build_embedded(values)
    classes = num_classes or _head_size(model, state) or values["arguments"]["num_classes"]
    if state is None:
        fit_weights(model, embedded_state(name), name=name, source="the embedded file")
    arguments = {**values["arguments"], "num_classes": classes}
    if classes != values["arguments"]["num_classes"]:
        _new_head(model, classes)
    return model, {"source": "timm", "architecture": values["architecture"], "arguments": arguments}


def _from_timm(
    name: str, state: Mapping[str, Tensor] | None, num_classes: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    import timm

    if not name.startswith(_HUBS) and not timm.is_model(name.split(".")[0]):
        if Path(name).suffix in (".safetensors", ".pt", ".pth", ".onnx"):
            raise PlanishError(f"{name} is a file, no model: expected {KINDS}; a file of weights goes into --weights")
        known = [*EMBEDDED_MODELS, *timm.list_models()]
        close = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.0)
        raise PlanishError(
            f"there is no model {name!r}: expected {KINDS}; the closest of timm's and planish's are {', '.join(close)}"
        )
    try:
        model = timm.create_model(name, pretrained=state is None)
    except Exception as error:  # urllib, httpx, huggingface_hub and timm each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if state is not None:
            raise PlanishError(f"timm cannot build {name}: {reason}") from error
        raise PlanishError(
            f"the pretrained weights of {name} could not be fetched: {reason}; --weights FILE loads local ones"
        ) from error
    classes = num_classes or _head_size(model, state)
    arguments = {}
    if classes is not None and classes != model.num_classes:
        _new_head(model, classes)
    if classes is not None:
        arguments["num_classes"] = classes
    return model, {"source": "timm", "architecture": name, "arguments": arguments}


def _head_size(model: nn.Module, state: Mapping[str, Tensor] | None) -> int | None:
    """The number of classes of a checkpoint for a timm model, by the name of its classifier."""
    config: Any = getattr(model, "pretrained_cfg", {})
    classifier = config.get("classifier")
    weight = None if state is None or not isinstance(classifier, str) else state.get(f"{classifier}.weight")
    return None if weight is None else len(weight)


def _new_head(model: Any, classes: int) -> None:
    with new_head():
        model.reset_classifier(classes)


def loses_head(name: str) -> bool:
    """Whether ``load_model(name, num_classes=0)`` gives features: embedded networks and those of timm."""
    return split_file_name(name) is None and not is_huggingface(name) and not name.startswith(TORCHVISION)


def _take_off_head(model: Any, name: str, recipe: dict[str, Any]) -> None:
    if recipe["source"] != "timm":
        raise PlanishError(
            f"{name}: only networks of timm lose their head by num_classes=0; give file.py:function that returns one "
            f"without a head, and planish_task = 'features' as its attribute"
        )
    model.reset_classifier(0)
    recipe["arguments"] = {**recipe["arguments"], "num_classes": 0}
    say_task(model, FEATURES.name)


@torch.no_grad()
def check_classes(model: nn.Module, data: ImageData) -> None:
    """Put one test image through the model and compare the width of its output with the number of classes.

    Raises:
        PlanishError: when they differ, or when the model cannot take such an image.
    """
    output, task = check_output(model, data.test[0][0], data.name)
    if task is FEATURES:
        return
    if task is LABELS and output.shape[1] == 1 and len(data.classes) == 2:
        return  # the second class, or not
    if output.shape[1] != len(data.classes):
        raise PlanishError(
            f"the model gives {output.shape[1]} logits and {data.name} has {len(data.classes)} classes: "
            f"give num_classes={len(data.classes)} for a new head, or data with the model's classes"
        )
    own = getattr(model, "planish_classes", None)
    if own is not None and sorted(own) == sorted(data.classes) and list(own) != list(data.classes):
        wrong = next(i for i, pair in enumerate(zip(own, data.classes, strict=True)) if pair[0] != pair[1])
        raise PlanishError(
            f"the model's class {wrong} is {own[wrong]!r} and that of {data.name} is {data.classes[wrong]!r}: the "
            f"names are the same in another order, so put the data's into the model's (class folders sort by name)"
        )


def check_output(model: nn.Module, image: Tensor, source: str) -> tuple[Tensor, Task]:
    """Put one image (channels, height, width) through the model; what comes out, and what it means.

    Args:
        source: where the image is from, for the sentence.

    Raises:
        PlanishError: the model cannot take such an image, or gives no logits.
    """
    image = image[None]
    parameter = next(model.parameters(), None)
    training = model.training
    try:
        output = model.eval()(image if parameter is None else image.to(parameter))
    except (RuntimeError, AssertionError, ValueError) as error:
        own = getattr(model, "planish_recipe", {}).get("source") == "file"
        advice = "; your own model says what it takes in its attribute planish_preprocessing (docs/models.md)"
        raise PlanishError(
            f"the model cannot take images of shape {tuple(image.shape[1:])}, as they are prepared for it from "
            f"{source}: {error}{advice if own else ''}"
        ) from error
    finally:
        model.train(training)
    output = logits_of(output)
    task = task_of(model, output)
    if task is not FEATURES and output.dim() != 2:
        raise PlanishError(f"the model's output has shape {tuple(output.shape)}, expected logits (images, classes)")
    return output, task


def classes_of(model: nn.Module, data: ImageData) -> list[str]:
    """The names of the model's classes if it has any, else those of the data that it is used with."""
    return list(getattr(model, "planish_classes", None) or data.classes)
