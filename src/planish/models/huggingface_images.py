"""What an image processor of transformers does to an image, in the words of :class:`planish.Preprocessing`.

Where an odd number of pixels is cut away, the centre that is kept may lie one pixel beside theirs: transformers rounds
its corner down, torchvision and timm to the even number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planish.errors import PlanishError
from planish.models.huggingface_config import quietly
from planish.models.preprocessing import Preprocessing

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
PLAIN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "MobileViT", "MobileNetV1", "MobileNetV2", "Pvt", "Siglip",
         "EfficientNet")  # fmt: skip
OWN_RESIZE = ("ConvNext", "Levit", "PoolFormer")


def huggingface_preprocessing(folder: Path, channels: int) -> Preprocessing:
    """The preprocessing that ``preprocessor_config.json`` in a folder asks for.

    Raises:
        PlanishError: there is none, or it does something that planish's preprocessing has no word for.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        raise PlanishError(
            f"{folder} has no {names[0]}, so it is not known what the images go through: save the image processor "
            f"of the model there with its save_pretrained"
        )
    try:
        with quietly():
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:300]
        raise PlanishError(f"{folder / names[0]} is not understood by transformers: {reason}") from error
    kind = type(processor).__name__
    try:
        return preprocessing_of(kind, processor.to_dict(), channels)
    except PlanishError as error:
        raise PlanishError(f"{folder}: {error}") from None


def preprocessing_of(kind: str, values: Mapping[str, Any], channels: int = 3) -> Preprocessing:
    """The preprocessing of an image processor's class and settings.

    Args:
        kind: such as ``ViTImageProcessor``.
        values: its settings: size, crop_size, resample, rescale_factor, image_mean and so on.
        channels: of the network; one-channel networks get grey images.

    Raises:
        PlanishError: something cannot be expressed.
    """
    name = kind.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor")
    if name not in PLAIN + OWN_RESIZE:
        raise PlanishError(
            f"its image processor {kind} is not one that planish imitates ({', '.join(PLAIN + OWN_RESIZE)}): "
            f"load the model in a file.py:function and give it planish_preprocessing"
        )
    if values.get("do_pad"):
        raise PlanishError("its image processor pads images to a size (do_pad), which planish's preprocessing cannot")
    if not values.get("do_resize", True):
        raise PlanishError("its image processor leaves images at their own size (do_resize), planish needs one size")
    size, crop_pct, mode = _geometry(name, values)
    mean, std = _normalization(name, values, channels)
    resample = values.get("resample")
    if resample is not None and int(resample) not in INTERPOLATIONS:
        raise PlanishError(f"its image processor has the resampling {resample!r}, expected a number of Pillow's")
    interpolation = "bilinear" if resample is None else INTERPOLATIONS[int(resample)]
    order = "rgb"
    if values.get("do_flip_channel_order") and channels == 3:  # the last thing that it does
        mean, std, order = mean[::-1], std[::-1], "bgr"
    return Preprocessing((channels, *size), mean, std, interpolation, crop_pct, mode, order)


def _sides(value: Any) -> dict[str, int]:
    """A size in any of its spellings, without what is not set."""
    if isinstance(value, int):
        return {"height": value, "width": value}
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return {"height": value[0], "width": value[1]}
    return {key: side for key, side in dict(value or {}).items() if side is not None}


def _geometry(name: str, values: Mapping[str, Any]) -> tuple[tuple[int, int], float, str]:
    """(height, width) of the input, crop_pct and crop_mode."""
    size, crop = _sides(values.get("size")), None
    if values.get("do_center_crop"):
        crop = _sides(values.get("crop_size"))
    if name == "ConvNext":
        edge, share = size["shortest_edge"], values.get("crop_pct") or 224 / 256
        if edge >= 384:
            return (edge, edge), 1.0, "squash"
        return (edge, edge), _share((edge, edge), (int(edge / share),) * 2), "center"
    if set(size) == {"height", "width"} and name != "PoolFormer":
        resized = (size["height"], size["width"])
        if crop is None:
            return resized, 1.0, "squash"
        cropped = (crop["height"], crop["width"])
        return cropped, _share(cropped, resized), "squash"
    if set(size) == {"shortest_edge"} or (name == "PoolFormer" and len(set(size.values())) == 1):
        edge = next(iter(size.values()))
        if name == "Levit":
            edge = int((256 / 224) * edge)
        if name == "PoolFormer" and values.get("crop_pct"):
            edge = int(edge / values["crop_pct"])
        if crop is None or set(crop) != {"height", "width"}:
            raise PlanishError("its image processor sets the shorter side alone and crops nothing (do_center_crop), "
                               "planish needs one size")  # fmt: skip
        if crop["height"] != crop["width"]:
            raise PlanishError(f"its image processor crops {crop['height']} x {crop['width']} out of images of one "
                               f"shorter side, planish crops squares out of them")  # fmt: skip
        cropped = (crop["height"], crop["width"])
        return cropped, _share(cropped, (edge, edge)), "center"
    raise PlanishError(f"its image processor resizes to {size}, expected height and width, or shortest_edge")


def _share(cropped: tuple[int, int], resized: tuple[int, int]) -> float:
    """The crop_pct by which ``floor(side / crop_pct)`` is the resized side, for both sides."""
    first = cropped[0] / resized[0]
    for share in (first, math.nextafter(first, 0), math.nextafter(first, 1), cropped[1] / resized[1]):
        if 0 < share <= 1 and all(math.floor(c / share) == r for c, r in zip(cropped, resized, strict=True)):
            return share
    raise PlanishError(f"its image processor crops {cropped[0]} x {cropped[1]} out of {resized[0]} x {resized[1]}, "
                       f"which planish's preprocessing cannot: it crops the same share of both sides")  # fmt: skip


def _normalization(name: str, values: Mapping[str, Any], channels: int) -> tuple[Any, Any]:
    """Mean and std for pixels in [0, 1], whatever the processor rescales to."""
    mean, std = [0.0] * channels, [1.0] * channels
    if values.get("do_normalize", True) and name != "MobileViT" and values.get("image_mean") is not None:
        mean, std = (_spread(values[key], channels) for key in ("image_mean", "image_std"))
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    if name == "EfficientNet":
        if values.get("rescale_offset") and values.get("do_rescale", True):  # pixels * factor - 1
            mean = [m + 1 for m in mean]
        if values.get("include_top"):  # divided by std once more
            std = [s * s for s in std]
    unit = 255 * factor
    if math.isclose(unit, 1.0, rel_tol=1e-6):  # 0.00392156862745098 and the like
        return tuple(mean), tuple(std)
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _spread(value: Any, channels: int) -> list[float]:
    numbers = [float(x) for x in value] if isinstance(value, (list, tuple)) else [float(value)] * channels
    if channels == 1 and len(numbers) == 3:
        return [sum(numbers) / 3]
    return numbers
