"""One image file to pixels, whatever its mode; and which files of a list cannot be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))


def decode(path: Path, channels: int) -> Image.Image:
    """The image as mode "L" (1 channel) or "RGB" (3), upright as its EXIF orientation says.

    16-bit and float images are brought to 8 bits, an alpha channel is dropped, of an animation the first frame counts.

    Raises:
        OSError, SyntaxError, ValueError: from Pillow, for what is no image or is truncated.
        PIL.Image.DecompressionBombError: for more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (Pillow itself only warns
            up to twice as many).
    """
    with Image.open(path) as file:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and file.width * file.height > limit:
            raise Image.DecompressionBombError(
                f"{file.width} x {file.height} pixels are more than the limit of {limit}"
            )
        file.load()
        return _eight_bits(ImageOps.exif_transpose(file)).convert("L" if channels == 1 else "RGB")


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


def find_unreadable(
    paths: Sequence[Path], channels: int, progress: Callable[[int, int], None] | None = None
) -> dict[int, str]:
    """Decode every file and give the index and the reason of each that fails.

    Only decoding to the end finds a truncated file. Pillow decodes outside the interpreter lock, so threads help.

    Args:
        progress: called as ``progress(done, total)`` from the calling thread.
    """

    def attempt(path: Path) -> str | None:
        try:
            decode(path, channels)
        except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, EOFError, ...
            return str(error).split(" <")[0].replace(str(path), path.name) or type(error).__name__
        return None

    unreadable: dict[int, str] = {}
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # about metadata and sizes: what matters is found by decoding
        for done, reason in enumerate(pool.map(attempt, paths), start=1):
            if reason is not None:
                unreadable[done - 1] = reason
            if progress is not None and (done % 100 == 0 or done == len(paths)):
                progress(done, len(paths))
    return unreadable
