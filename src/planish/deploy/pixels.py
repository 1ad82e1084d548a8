"""An image as a model's input, with Pillow and numpy alone: to the bit what timm's evaluation transform gives."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from planish.errors import PlanishError
from planish.images import check_resized, reversed_channels
from planish.preprocessing import Preprocessing, resized_size

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_input(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Resize, crop and normalize ``image`` (mode "L" or "RGB", as many channels as the model has).

    Returns:
        float32, shape (channels, height, width).

    Raises:
        PlanishError: the interpolation is not known, or the image is so long and narrow that it would be resized to
            more than Pillow's limit of pixels, or to none.
    """
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise PlanishError(
            f"preprocessing: the interpolation {preprocessing.interpolation!r:.60} is not known, "
            f"expected one of {', '.join(INTERPOLATIONS)}"
        )
    if preprocessing.channel_order == "bgr":
        image = reversed_channels(image)
    border = preprocessing.crop_mode == "border"
    fill = tuple(round(255 * value) for value in preprocessing.mean) if border else 0
    height, width = preprocessing.input_size[1:]
    image = _crop(_resize(image, preprocessing), height, width, fill)
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def _resize(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    check_resized(image.width, image.height, preprocessing)
    height, width = resized_size(image.height, image.width, preprocessing)
    if (height, width) == (image.height, image.width):
        return image
    return image.resize((width, height), INTERPOLATIONS[preprocessing.interpolation])


def _crop(image: Image.Image, height: int, width: int, fill: int | tuple[int, ...]) -> Image.Image:
    """The centre; where the image is too small, ``fill`` on both sides, the odd line at the bottom or the right."""
    short, narrow = max(height - image.height, 0), max(width - image.width, 0)
    if short or narrow:
        edges = (narrow // 2, short // 2, (narrow + 1) // 2, (short + 1) // 2)
        image = ImageOps.expand(image, edges, fill)
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))
