"""What builds a network of transformers: the name of its class and the values of its configuration, as plain data.

A recipe is ``{"source": "hf", "architecture": "ViTForImageClassification", "arguments": {"hidden_size": 192, ...}}``.
It may come from a file that is hostile, so that only the classes below, all of transformers' own code, and the fields
that their configurations declare are accepted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from planish.errors import PlanishError

SOURCE = "hf"
MOST_LABELS = 1_000_000

# Families whose networks take images alone, are built from their configuration alone, and give logits.
FAMILIES = (
    "beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers",
    "donut-swin", "efficientnet", "focalnet", "hgnet_v2", "hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2",
    "mobilevit", "mobilevitv2", "poolformer", "pp_lcnet", "pvt", "pvt_v2", "regnet", "resnet", "segformer",
    "swiftformer", "swin", "swinv2", "textnet", "vit", "vit_msn",
)  # fmt: skip


def transformers_or_say(what: str) -> Any:
    """The package transformers.

    Raises:
        PlanishError: it is not installed, or too old.
    """
    try:
        with quietly():
            import transformers
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: F401
            from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING  # noqa: F401
    except ImportError as error:
        raise PlanishError(f"{what}, and transformers is not installed ({error}): pip install 'planish[hf]'") from None
    return transformers


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """transformers logs, warns and draws progress bars; what matters is said in an error."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, None
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as own

        if own.is_progress_bar_enabled():
            bars = own
            bars.disable_progress_bar()
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars is not None:
            bars.enable_progress_bar()


def _class_names() -> dict[str, str]:
    """The family of each class that may be built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as known

    names: dict[str, str] = {}
    for family in FAMILIES:
        classes = known.get(family, ())
        names |= dict.fromkeys((classes,) if isinstance(classes, str) else classes, family)
    return names


def _classes(architecture: str) -> tuple[Any, Any]:
    """The configuration's and the network's class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    config = CONFIG_MAPPING[_class_names()[architecture]]
    found: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config]
    for kind in found if isinstance(found, tuple) else (found,):
        if kind.__name__ == architecture:
            return config, kind
    raise PlanishError(f"this transformers has no {architecture}")


def _fields(config: Any) -> set[str]:
    """The values that a configuration class declares itself, without what all of them have."""
    import transformers

    base: Any = transformers.PretrainedConfig
    if dataclasses.is_dataclass(config):
        common = {field.name for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else set()
        names = {field.name for field in dataclasses.fields(config)} - common
    else:
        names = set(inspect.signature(config.__init__).parameters) - {"self", "kwargs"}
    return {name for name in names if not name.startswith("_")} - {"out_features", "out_indices"} | {"num_labels"}


def check_huggingface(architecture: Any, arguments: Mapping[str, Any]) -> None:
    """Raise :class:`PlanishError` unless this is a known class and each argument a field of its configuration.

    Its modules are imported, so that building it imports nothing more.
    """
    import transformers

    transformers_or_say("its architecture is one of Hugging Face's")
    if not isinstance(architecture, str) or architecture not in _class_names():
        shown = ascii(architecture)[:60]
        raise PlanishError(f"its architecture {shown} is no image classifier of transformers that planish builds")
    with quietly():
        config, _ = _classes(architecture)
    if unknown := sorted(set(arguments) - _fields(config)):
        raise PlanishError(
            f"its architecture {architecture} has no setting {ascii(unknown[0])[:60]} in transformers "
            f"{transformers.__version__}"
        )
    labels = arguments.get("num_labels")
    if isinstance(labels, bool) or not isinstance(labels, int) or not 1 <= labels <= MOST_LABELS:
        raise PlanishError(f"its architecture has num_labels {ascii(labels)[:60]}, expected 1 to {MOST_LABELS}")


def build_huggingface(architecture: str, arguments: Mapping[str, Any], *, meta: bool = False) -> nn.Module:
    """The network of a recipe with random weights; with ``meta`` on PyTorch's meta device, without memory.

    Raises:
        PlanishError: the recipe is not accepted, see :func:`check_huggingface`, or transformers cannot build it.
    """
    import torch

    check_huggingface(architecture, arguments)
    config, kind = _classes(architecture)
    try:
        with quietly(), torch.device("meta") if meta else contextlib.nullcontext():
            return kind(config(**arguments))
    except Exception as error:  # each family has its own about values that it does not take
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PlanishError(f"its architecture {architecture} cannot be built: {reason}") from error


def recipe_from_config(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """The recipe and the class names of the content of a ``config.json``.

    Raises:
        PlanishError: it is of no family that planish knows, or quantized already.
    """
    family = values.get("model_type")
    if family == "timm_wrapper":
        raise PlanishError(f"{source} is a model of timm: name it as timm does (hf-hub:OWNER/NAME, local-dir:FOLDER)")
    if not isinstance(family, str) or family not in FAMILIES:
        raise PlanishError(
            f"{source}: its model_type is {ascii(family)[:60]}, expected an image classifier of the families "
            f"{', '.join(FAMILIES)}"
        )
    if values.get("quantization_config") is not None:
        raise PlanishError(f"{source} is quantized already (quantization_config): give the model in float")
    known = [name for name, own in _class_names().items() if own == family]
    if not known:
        raise PlanishError(f"this transformers has no image classifier of the family {family}: update it")
    named = values.get("architectures")
    named = named if isinstance(named, list) else []
    architecture = next((name for name in known if name in named), known[0])
    config, _ = _classes(architecture)
    fields = _fields(config)
    try:
        with quietly():
            # old names of settings are translated by the class; what else is in the file is left away
            kept = {key: value for key, value in values.items() if not _is_general(key)}
            read = config.from_dict(kept).to_dict()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PlanishError(f"{source}: transformers does not take its configuration: {reason}") from error
    arguments = json_values({key: read[key] for key in sorted(fields & read.keys())})
    labels = values.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else values.get("num_labels", 2)
    arguments["num_labels"] = count
    check_huggingface(architecture, arguments)
    return {"source": SOURCE, "architecture": architecture, "arguments": arguments}, class_names(labels)


def _is_general(key: str) -> bool:
    """What the configurations of all families can have; nothing of it shapes a network in float."""
    return key.startswith("_") or "implementation" in key or key in {
        "architectures", "auto_map", "id2label", "label2id", "num_labels", "torch_dtype", "dtype", "model_type",
        "transformers_version", "problem_type", "output_hidden_states", "output_attentions", "return_dict",
        "quantization_config", "task_specific_params", "finetuning_task", "custom_pipelines", "torchscript",
        "use_bfloat16", "pruned_heads", "is_encoder_decoder", "chunk_size_feed_forward", "out_features", "out_indices",
        "stage_names", "backbone", "backbone_config", "use_pretrained_backbone", "use_timm_backbone", "name_or_path",
    }  # fmt: skip


def json_values(values: Any) -> Any:
    """The same with lists for tuples."""
    if isinstance(values, Mapping):
        return {str(key): json_values(value) for key, value in values.items()}
    return [json_values(value) for value in values] if isinstance(values, (list, tuple)) else values


def class_names(labels: Any) -> tuple[str, ...] | None:
    """The names in ``id2label``, in the order of the logits; None for those that transformers makes up itself."""
    if not isinstance(labels, Mapping) or not labels:
        return None
    by_index = {str(key): value for key, value in labels.items()}
    names = [by_index.get(str(i)) for i in range(len(by_index))]
    if not all(isinstance(name, str) and name for name in names):
        return None
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return None
    return tuple(str(name) for name in names)


def recipe_of(model: nn.Module) -> tuple[dict[str, Any], tuple[str, ...] | None] | None:
    """The recipe and class names of a network that transformers made, from its own configuration; None for others."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not isinstance(family, str) or family not in FAMILIES or "transformers" not in sys.modules:
        return None
    kind = next((c.__name__ for c in type(model).__mro__ if c.__name__ in _class_names()), None)
    if kind is None:
        return None
    values = config.to_dict()
    labels = getattr(config, "id2label", None)
    return recipe_from_config({**values, "architectures": [kind], "id2label": labels}, kind)
