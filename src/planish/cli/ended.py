"""What is said when a command ends before its time: no memory, no room on the disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from planish.errors import NotWritten, PlanishError, is_out_of_memory

_WORKER = re.compile(r"DataLoader worker .*(killed|exited|bus error)", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)


@contextmanager
def saying_what_is_kept(kept: Callable[[], str], batch_size: int | None = None) -> Iterator[None]:
    """Inside, an end for want of memory or of room on the disk is one sentence, which says how to go on.

    Args:
        kept: what is kept, and how to continue; asked when it has happened.
        batch_size: what the command worked with.

    Raises:
        PlanishError: the sentence.
    """
    try:
        yield
    except NotWritten as error:
        raise NotWritten(f"{error}; {kept()}") from error
    except (MemoryError, RuntimeError) as error:
        text = about_memory(error, batch_size)
        if text is None:
            raise
        raise PlanishError(f"{text}; {kept()}") from error


def about_memory(error: BaseException, batch_size: int | None = None) -> str | None:
    """A sentence for an error that tells of too little memory, on the device or on this machine; ``None`` for others.

    >>> about_memory(MemoryError(), 128)
    'this machine is out of memory with --batch-size 128: try --batch-size 64, ...'
    """
    text = str(error)
    if _WORKER.search(text):
        return "a process that reads images was killed, most often for want of memory: try fewer --workers"
    on_device = type(error).__name__ == "OutOfMemoryError" or "CUDA" in text
    if not is_out_of_memory(error):
        return None
    wanted = _WANTED.search(text)
    amount = f" (it asked for {wanted[1]} more)" if wanted else ""
    with_size = f" with --batch-size {batch_size}" if batch_size else ""
    tries = [f"--batch-size {batch_size // 2}"] if batch_size and batch_size > 1 else []
    tries += [] if batch_size else ["a smaller --batch-size"]
    if on_device:
        tries += ["--mixed-precision bf16 where it trains", "more processes", "ending what else runs on the device"]
        return f"the device is out of memory{with_size}{amount}: try {', or '.join(tries)}"
    tries += ["fewer --calibration-images", "fewer --workers"]
    return f"this machine is out of memory{with_size}{amount}: try {', or '.join(tries)}"
