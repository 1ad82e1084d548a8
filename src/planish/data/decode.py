"""Encoded images, wherever they are kept: reading one, and finding those of a list that cannot be read."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from planish.images import decode

MAX_BYTES = 2 << 30
"""What is larger than this is no image that Pillow would open within its limit of pixels."""
_CHUNK = 4096


class Encoded(Protocol):
    """One encoded image: a ``Path`` is one, a member of a tar file and a row of a data set are others.

    ``str`` names it in messages. It is hashable, and can be sent to a worker process. An attribute ``place``, where it
    has one, is a tuple that sorts like the order on the disk.
    """

    def read_bytes(self) -> bytes:
        """The encoded bytes; an ``OSError`` says why there are none."""
        ...


def read_encoded(source: Encoded) -> bytes:
    """The encoded bytes, unless they are too many to be an image (``ValueError``)."""
    size = source.stat().st_size if isinstance(source, Path) else getattr(source, "size", 0)
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes are more than the limit of {MAX_BYTES}")
    return source.read_bytes()


def read_image(source: Encoded, channels: int) -> Image.Image:
    """The decoded image, as :func:`planish.images.decode` gives and refuses it."""
    return decode(io.BytesIO(read_encoded(source)), channels)


@dataclass
class Checked:
    """By number in the list: why an image cannot be read, or the hash of its encoded bytes."""

    unreadable: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)


def check_images(
    sources: Sequence[Encoded], channels: int, progress: Callable[[int, int], None] | None = None
) -> Checked:
    """Decode every image, and say of each that fails why.

    Only decoding to the end finds a truncated file. Pillow decodes outside the interpreter lock, so threads help.

    Args:
        progress: called as ``progress(done, total)`` from the calling thread.
    """

    def attempt(source: Encoded) -> str | bytes:
        try:
            data = read_encoded(source)
            decode(io.BytesIO(data), channels)
        except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, EOFError, ...
            return _reason(error)
        return hashlib.blake2b(data, digest_size=16).digest()

    checked, total = Checked(), len(sources)
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # about metadata and sizes: what matters is found by decoding
        for start in range(0, total, _CHUNK):  # a million tasks at once would fill the memory with their futures
            for index, result in enumerate(pool.map(attempt, sources[start : start + _CHUNK]), start):
                if isinstance(result, str):
                    checked.unreadable[index] = result
                else:
                    checked.digests[index] = result
                if progress is not None and ((index + 1) % 100 == 0 or index + 1 == total):
                    progress(index + 1, total)
    return checked


def _reason(error: Exception) -> str:
    """Without addresses of objects and paths, which the sentence around it names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).split(" <")[0] or type(error).__name__
