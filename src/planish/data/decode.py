"""Encoded images, wherever they are kept: reading one, and finding those of a list that cannot be read."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from planish.data.scanned import ScanCache, Scanned, key_of
from planish.errors import PlanishError
from planish.images import check_resized, decode
from planish.preprocessing import Preprocessing

MAX_BYTES = 1 << 29
"""What is larger than this is no image within Pillow's limit of 89 million pixels, not even with 16 bits a channel."""
_CHUNK = 4096
_TOGETHER = 16

T = TypeVar("T")


class Encoded(Protocol):
    """One encoded image: a ``Path`` is one, a member of a tar file and a row of a data set are others.

    ``str`` names it in messages. It is hashable, and can be sent to a worker process. An attribute ``place``, where it
    has one, is a tuple that sorts like the order on the disk. An attribute ``stamp``, where it has one, is a text that
    changes when the image does.
    """

    def read_bytes(self) -> bytes:
        """The encoded bytes; an ``OSError`` says why there are none."""
        ...


def read_encoded(source: Encoded) -> bytes:
    """The encoded bytes, unless they are too many to be an image (``ValueError``)."""
    if isinstance(source, Path):
        return read_file(source)
    if (size := getattr(source, "size", 0)) > MAX_BYTES:
        raise ValueError(f"{size} bytes are more than the limit of {MAX_BYTES}")
    return source.read_bytes()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file: a pipe would never end, and neither would a device."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("no regular file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"{found.st_size} bytes are more than the limit of {MAX_BYTES}")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)  # it may have no size, or grow meanwhile
    if len(data) > MAX_BYTES:
        raise ValueError(f"more bytes than the limit of {MAX_BYTES}")
    return data


def read_image(source: Encoded, preprocessing: Preprocessing) -> Image.Image:
    """The decoded image, as :func:`planish.images.decode` gives and refuses it, if it can be brought to the model."""
    return _decoded(read_encoded(source), preprocessing)


def _decoded(data: bytes, preprocessing: Preprocessing) -> Image.Image:
    image = decode(io.BytesIO(data), preprocessing.input_size[0])
    check_resized(image.width, image.height, preprocessing)
    return image


@dataclass
class Checked:
    """By number in the list: why an image cannot be read, or the hash of its encoded bytes."""

    unreadable: dict[int, str] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)


def check_images(
    sources: Sequence[Encoded],
    preprocessing: Preprocessing,
    progress: Callable[[int, int], None] | None = None,
    cache: ScanCache | None = None,
) -> Checked:
    """Decode every image, and say of each that fails why.

    Only decoding to the end finds a truncated file. Pillow decodes outside the interpreter lock, so threads help.

    Args:
        progress: called as ``progress(done, total)`` from the calling thread.
        cache: what is known of images that were decoded before and are the same by their stamp.
    """

    checked, total, done = Checked(), len(sources), 0
    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # about metadata and sizes: what matters is found by decoding
        for start in _starts(total):  # a million tasks at once would fill the memory with their futures
            part = sources[start : start + _CHUNK]
            keys = [None] * len(part) if cache is None else list(_each(pool, part, key_of))
            known = {} if cache is None else cache.look_up(keys)
            fresh: dict[bytes, Scanned] = {}
            entries = list(zip(part, keys, strict=True))
            look = partial(_attempt, preprocessing=preprocessing, known=known)
            for index, (key, result) in enumerate(zip(keys, _each(pool, entries, look), strict=True), start):
                done += 1
                if isinstance(result, str):
                    checked.unreadable[index] = result
                else:
                    checked.digests[index] = result.digest
                    if key is not None and key not in known:
                        fresh[key] = result
                if progress is not None and (done % 100 == 0 or done == total):
                    progress(done, total)
            if cache is not None:
                cache.add(fresh)
    checked.unreadable = dict(sorted(checked.unreadable.items()))
    return checked


def _attempt(
    entry: tuple[Encoded, bytes | None], preprocessing: Preprocessing, known: Mapping[bytes, Scanned]
) -> str | Scanned:
    """Why an image cannot be read, or what it is; by its key, where that is known."""
    source, key = entry
    try:
        if key is not None and key in known:
            check_resized(known[key].width, known[key].height, preprocessing)
            return known[key]
        data = read_encoded(source)
        image = _decoded(data, preprocessing)
    except Exception as error:  # decoders raise a zoo: OSError, SyntaxError, struct.error, EOFError, ...
        return reason_of(error)
    return Scanned(hashlib.blake2b(data, digest_size=16).digest(), image.width, image.height)


def _each(pool: ThreadPoolExecutor, items: Sequence[Any], function: Callable[[Any], T]) -> Iterator[T]:
    """``function`` of each item in order, some at a time: a task costs as much as looking up an image that is known."""
    slices = [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]
    for results in pool.map(lambda some: [function(item) for item in some], slices):
        yield from results


def _starts(total: int) -> Iterator[int]:
    """Where each part begins. Of several processes each begins elsewhere, so that through the cache they share work."""
    starts = range(0, total, _CHUNK)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    shift = len(starts) * rank // max(1, world)
    yield from starts[shift:]
    yield from starts[:shift]


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, without addresses of objects and paths, which the sentence around it names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, PlanishError):
        return str(error)
    lines = str(error).split(" <")[0].strip().splitlines()
    return lines[0] if lines else type(error).__name__
