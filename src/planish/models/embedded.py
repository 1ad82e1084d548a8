"""The two networks that come with the package, and their cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from planish.errors import PlanishError
from planish.models.preprocessing import Preprocessing
from planish.models.weights import read_weights

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED_MODELS = ("vit", "convnet")


def card(name: str) -> dict[str, Any]:
    """What is known about an embedded network: architecture, arguments, mean, std, seed, epochs, measured top-1, ...

    Raises:
        PlanishError: for a name that is not ``"vit"`` or ``"convnet"``, or weights that cannot be read.
    """
    return _read(name)[1]


def _read(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name not in EMBEDDED_MODELS:
        raise PlanishError(f"there is no embedded model {name!r}: expected {' or '.join(EMBEDDED_MODELS)}")
    path = WEIGHTS / f"{name}.safetensors"
    state, metadata = read_weights(path)
    try:
        return state, json.loads(metadata["planish"])
    except (KeyError, json.JSONDecodeError) as error:
        raise PlanishError(f"{path} lacks its card (metadata key 'planish'): reinstall planish") from error


def embedded_state(name: str) -> dict[str, Any]:
    """The weights of an embedded network by key."""
    return _read(name)[0]


def embedded_preprocessing(values: dict[str, Any]) -> Preprocessing:
    """Preprocessing of a card: its mean and std, the size of the Fashion-MNIST images, nothing cropped."""
    arguments = values["arguments"]
    size = arguments.get("img_size", 28)
    return Preprocessing(
        (arguments.get("in_chans", 3), size, size), tuple(values["mean"]), tuple(values["std"]), crop_pct=1.0
    )


def build_embedded(values: dict[str, Any]) -> nn.Module:
    """The network of a card, with random weights."""
    import timm

    return timm.create_model(values["architecture"], **values["arguments"])
