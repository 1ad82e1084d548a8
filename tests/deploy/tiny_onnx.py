"""Exported models by hand: flatten and one matrix product, with a card. What the tests of this folder run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from planish.deploy.card import Card
from planish.preprocessing import Preprocessing

CLASSES = ("dark", "light", "neither")
GREY = Preprocessing((1, 8, 8), (0.5,), (0.25,), "bilinear", 1.0)


def tiny_card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "name": "tiny", "scheme": "w4a4", "classes": CLASSES, "preprocessing": GREY, "planish": "0.1.0",
        "protocol": {"calibration_images": 8},
    }  # fmt: skip
    return Card(**(values | changes))


def weights(card: Card) -> np.ndarray:
    """(pixels, classes): the first class likes dark pixels, the second light ones, the others nothing."""
    n = int(np.prod(card.preprocessing.input_size))
    columns = np.zeros((n, len(card.classes)), np.float32)
    columns[:, 0], columns[:, 1] = -1 / n, 1 / n
    return columns


def tiny_model(card: Card, **changes: Any) -> onnx.ModelProto:
    """``changes``: ``input``, ``output``, ``input_type``, ``shape`` (of the input), ``metadata``, ``weight``."""
    names = changes.get("input", "images"), changes.get("output", "logits")
    shape = changes.get("shape", ["batch", *card.preprocessing.input_size])
    weight = changes.get("weight", weights(card))
    kind = changes.get("input_type", TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", [names[0]], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], [names[1]]),
    ]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info(names[0], kind, shape)],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, changes.get("metadata", card.to_metadata()))
    return model


def save_tiny(path: Path, card: Card | None = None, **changes: Any) -> Path:
    onnx.save(tiny_model(card or tiny_card(), **changes), path)
    return path
