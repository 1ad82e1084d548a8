"""What a model expects of its input images: pure data, usable without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from planish.errors import PlanishError

ORDERS = ("rgb", "bgr")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resize to ``size / crop_pct``, crop the centre, normalize.

    ``input_size`` is (channels, height, width) with 1 channel (grey) or 3 (RGB); ``mean`` and ``std`` have one value a
    channel, for pixels in [0, 1]; ``interpolation`` and ``crop_mode`` are timm's names; ``channel_order`` is ``"rgb"``
    or ``"bgr"``, in which ``mean`` and ``std`` are then, too. The defaults are ImageNet's.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    channel_order: str = "rgb"

    def __post_init__(self) -> None:
        channels = self.input_size[0] if len(self.input_size) == 3 else None
        if channels not in (1, 3) or min(self.input_size) < 1:
            raise PlanishError(
                f"preprocessing: input_size is {self.input_size}, "
                "expected (channels, height, width) with 1 or 3 channels"
            )
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise PlanishError(
                f"preprocessing: {channels} channels need as many values of mean and of std (above 0), "
                f"got mean {self.mean} and std {self.std}"
            )
        if not 0 < self.crop_pct <= 1:
            raise PlanishError(f"preprocessing: crop_pct is {self.crop_pct}, expected a fraction in (0, 1]")
        if self.channel_order not in ORDERS or (self.channel_order == "bgr" and channels != 3):
            raise PlanishError(
                f"preprocessing: channel_order is {self.channel_order!r:.60} of {channels} channels, "
                f"expected rgb, or bgr of 3"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata; :func:`preprocessing_from` reads them back.

        ``channel_order`` is among them only where it is not ``"rgb"``: files from before it was there have none.
        """
        values = asdict(self)
        if self.channel_order == "rgb":
            del values["channel_order"]
        return values


def preprocessing_from(values: Mapping[str, Any]) -> Preprocessing:
    """Preprocessing from a mapping with any of its field names; lists become tuples, what is absent is the default.

    Raises:
        PlanishError: for an unknown name or values that do not fit each other.
    """
    known = set(Preprocessing.__dataclass_fields__)
    if unknown := sorted(set(values) - known):
        raise PlanishError(f"preprocessing: unknown entry {unknown[0]!r}, expected some of {', '.join(sorted(known))}")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in fields.items():
        if not _is(key, value):
            raise PlanishError(f"preprocessing: {key} is {value!r:.60}, expected {_KINDS[key]}")
    return Preprocessing(**fields)


_KINDS = {
    "input_size": "three whole numbers",
    "mean": "a list of numbers",
    "std": "a list of numbers",
    "interpolation": "a name",
    "crop_pct": "a number",
    "crop_mode": "a name",
    "channel_order": "a name",
}


def _is(key: str, value: Any) -> bool:
    """Whether a value is of the kind that its field holds; what comes from a file can be anything."""
    if key in ("interpolation", "crop_mode", "channel_order"):
        return isinstance(value, str)
    if key == "crop_pct":
        return _is_number(value)
    if not isinstance(value, tuple):
        return False
    return all(isinstance(x, int) and _is_number(x) if key == "input_size" else _is_number(x) for x in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # nor NaN


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) that an image is resized to before its centre is cropped.

    ``squash`` takes both sides to ``size / crop_pct``, ``border`` fits the image inside, ``center`` covers it. With
    square models timm leaves ``center`` to torchvision, which rounds the longer side down; otherwise it rounds to the
    nearest.
    """
    rows, columns = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.input_size[1:])
    ratios = (height / rows, width / columns)
    if preprocessing.crop_mode == "squash":
        return rows, columns
    if preprocessing.crop_mode == "border":
        return round(height / max(ratios)), round(width / max(ratios))
    if rows != columns:
        return round(height / min(ratios)), round(width / min(ratios))
    longer = int(rows * max(height, width) / min(height, width))
    return (longer, rows) if width <= height else (rows, longer)
