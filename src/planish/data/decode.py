"""Which image files of a list cannot be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planish.images import decode


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
