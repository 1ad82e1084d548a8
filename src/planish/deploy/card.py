"""The card of an exported model: what a program that runs the file must know, as JSON in the ONNX metadata.

A file with a card has one float32 input ``images`` (batch, channels, height, width), of which the batch is dynamic, and
one float32 output ``logits`` (batch, classes). Its metadata holds, under the key ``planish``, the object::

    {"format": 1, "planish": "0.1.0", "name": "vit", "scheme": "w4a4", "classes": ["T-shirt/top", ...],
     "preprocessing": {the fields of planish.Preprocessing}, "protocol": {...}}

``task`` may be there, too: ``labels`` (each output is a label, true where its sigmoid is above 0.5) or ``features``;
without it the outputs are classes. ``format`` is the version of this page. Nothing here needs PyTorch, onnx or ONNX
Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from planish.errors import PlanishError
from planish.preprocessing import Preprocessing, preprocessing_from

KEY = "planish"
FORMAT = 1
INPUT, OUTPUT = "images", "logits"
FLOAT = "float"  # the scheme of a model that is not quantized
MAX_SIDE, MIN_CROP = 8192, 0.01
_TEXTS = ("planish", "name", "scheme")
_PREPROCESSING = tuple(Preprocessing.__dataclass_fields__)
_FIELDS = ("format", *_TEXTS, "classes", "preprocessing", "protocol", "task")
_TASKS = ("classes", "labels", "features")


@dataclass(frozen=True)
class Card:
    """What is known of an exported model.

    Attributes:
        name: of the network, such as ``vit``.
        scheme: such as ``w4a4``; ``float`` when nothing is quantized.
        classes: the label of each output, in order; two may be the same.
        preprocessing: how an image becomes the model's input.
        planish: the version that wrote the file.
        protocol: what the numbers of this model depend on, as plain JSON values.
        task: what the outputs mean: ``classes``, ``labels`` or ``features``.

    Raises:
        PlanishError: a field is of another kind, empty, or of an impossible size.
    """

    name: str
    scheme: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    planish: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    task: str = "classes"

    def __post_init__(self) -> None:
        if self.task not in _TASKS:
            raise PlanishError(f"the card of the model: task is {self.task!r:.60}, expected {', '.join(_TASKS)}")
        for key in _TEXTS:
            value = getattr(self, key)
            if not isinstance(value, str) or not value:
                raise PlanishError(f"the card of the model: {key} is {value!r:.60}, expected a text")
        if not isinstance(self.classes, tuple) or not self.classes or not all(isinstance(x, str) for x in self.classes):
            raise PlanishError(f"the card of the model: classes is {self.classes!r:.60}, expected a list of labels")
        if not isinstance(self.preprocessing, Preprocessing):
            raise PlanishError("the card of the model: preprocessing is not planish's Preprocessing")
        size, share = self.preprocessing.input_size, self.preprocessing.crop_pct
        if max(size) > MAX_SIDE or share < MIN_CROP:
            raise PlanishError(
                f"the card of the model: input_size is {size} and crop_pct is {share}, "
                f"expected at most {MAX_SIDE} pixels a side and at least {MIN_CROP}"
            )
        if not isinstance(self.protocol, Mapping):
            raise PlanishError(f"the card of the model: protocol is {self.protocol!r:.60}, expected a JSON object")

    def to_metadata(self) -> dict[str, str]:
        """The entry for the metadata of an ONNX file: one key, one JSON text.

        Raises:
            PlanishError: the protocol holds something that JSON cannot (NaN and infinities among it).
        """
        values = {
            "format": FORMAT, "planish": self.planish, "name": self.name, "scheme": self.scheme,
            "classes": list(self.classes), "preprocessing": self.preprocessing.to_dict(),
            "protocol": dict(self.protocol),
        }  # fmt: skip
        if self.task != "classes":
            values["task"] = self.task
        try:
            return {KEY: json.dumps(values, allow_nan=False, ensure_ascii=False)}
        except (TypeError, ValueError) as error:
            raise PlanishError(f"the protocol of the model cannot be written as JSON: {error}") from error


def read_card(source: Any) -> Card:
    """The card of an ``onnx.ModelProto``, or of the metadata of an ONNX Runtime session as a mapping of texts.

    Raises:
        PlanishError: there is no card, or one that planish did not write like this.
    """
    if hasattr(source, "metadata_props"):
        source = {entry.key: entry.value for entry in source.metadata_props}
    if KEY not in source:
        raise PlanishError("the model has no planish card in its metadata, so it was not exported by planish")
    try:
        values = json.loads(source[KEY], parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PlanishError(f"the card of the model is not JSON: {str(error) or 'nested too deeply'}") from error
    if not isinstance(values, dict):
        raise PlanishError(f"the card of the model is a JSON {type(values).__name__}, expected an object")
    return _from_values(values)


def _from_values(values: dict[str, Any]) -> Card:
    if "format" in values and (isinstance(values["format"], bool) or values["format"] != FORMAT):
        raise PlanishError(
            f"the card of the model has format {values['format']!r:.60}, this planish reads {FORMAT}: "
            "update planish, or export the model again"
        )
    _check_names("the card of the model", values, _FIELDS, {"task"})
    classes, preprocessing = values["classes"], values["preprocessing"]
    if not isinstance(preprocessing, dict):
        raise PlanishError(f"the card of the model: preprocessing is {preprocessing!r:.60}, expected a JSON object")
    _check_names("the preprocessing in the card of the model", preprocessing, _PREPROCESSING, {"channel_order"})
    return Card(
        name=values["name"], scheme=values["scheme"], planish=values["planish"], protocol=values["protocol"],
        classes=tuple(classes) if isinstance(classes, list) else classes,
        preprocessing=preprocessing_from(preprocessing), task=values.get("task", "classes"),
    )  # fmt: skip


def _check_names(
    what: str, values: Mapping[str, Any], expected: tuple[str, ...], optional: Set[str] = frozenset()
) -> None:
    if missing := [key for key in expected if key not in values and key not in optional]:
        raise PlanishError(f"{what} lacks {missing[0]!r}: export the model again")
    if unknown := sorted(set(values) - set(expected)):
        raise PlanishError(f"{what} has an unknown entry {unknown[0]!r:.60}, expected {', '.join(expected)}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
