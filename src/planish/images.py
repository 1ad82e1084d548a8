"""Image files: which there are below a folder, and one of them to pixels, whatever its mode. Without PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from planish.errors import PlanishError
from planish.preprocessing import Preprocessing, resized_size

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""Pillow's names of the only formats that are opened, whatever a file is called. Pillow knows thirty others, and one of
them (EPS) runs another program."""
EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))


def decode(source: Path | BinaryIO, channels: int) -> Image.Image:
    """The image as mode "L" (1 channel) or "RGB" (3), upright as its EXIF orientation says.

    16-bit and float images are brought to 8 bits, an alpha channel is dropped, of an animation the first frame counts.

    Args:
        source: a file's path, or an open binary file.

    Raises:
        OSError, SyntaxError, ValueError: from Pillow, for what is no image of :data:`FORMATS`, is truncated, or holds
            text or a colour profile that unpacks to more than 1 MiB.
        PIL.Image.DecompressionBombError: for more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (Pillow itself only warns
            up to twice as many).
    """
    with Image.open(source, formats=FORMATS) as file:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and file.width * file.height > limit:
            raise Image.DecompressionBombError(
                f"{file.width} x {file.height} pixels are more than the limit of {limit}"
            )
        file.load()
        return _eight_bits(ImageOps.exif_transpose(file)).convert("L" if channels == 1 else "RGB")


def check_resized(width: int, height: int, preprocessing: Preprocessing) -> None:
    """Raise PlanishError for an image so long and narrow that it would be resized beyond Pillow's limit, or to no line.

    One of 30,000 x 1 pixels would become one of 7,680,000 x 256, of which the network sees the middle.
    """
    rows, columns = resized_size(height, width, preprocessing)
    limit = Image.MAX_IMAGE_PIXELS
    if (limit is not None and rows * columns > limit) or rows < 1 or columns < 1:
        more = "without a line" if rows < 1 or columns < 1 else f"more than the limit of {limit}"
        raise PlanishError(
            f"an image of {width} x {height} pixels would be resized to {columns} x {rows}, {more}: cut it"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Integer images of more than 8 bits lose their low byte; float images are read as [0, 1] or as [0, 255]."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow would warn about palette transparency otherwise
        return image.convert("RGBA")
    return image


def reversed_channels(image: Image.Image) -> Image.Image:
    """An RGB image with its first channel last, for networks that were trained on BGR."""
    return Image.merge(image.mode, image.split()[::-1])


def list_images(folder: Path) -> tuple[list[Path], int]:
    """The image files below a folder, sorted by name, hidden ones left out; and how many other files there are."""
    found, other = [], 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(n for n in names if not n.startswith(".")):
            if Path(name).suffix.lower() in EXTENSIONS:
                found.append(Path(parent, name))
            else:
                other += 1
    return found, other
