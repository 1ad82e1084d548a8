"""The exceptions that a user is meant to read."""

from __future__ import annotations

import errno
import os
import re

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}

_WORKER = "\nOriginal Traceback"
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket|gloo|nccl|timed out|timeout|process group", re.IGNORECASE
)


class PlanishError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_sentence(message))


class NotWritten(PlanishError):
    """A file could not be written, because the disk is full, say; what was there before is still there."""


def why_not_written(error: Exception) -> str:
    """What the system says about a write that failed, in a few words; of safetensors, too, which only tells in text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"os error (\d+)", str(error))):
        number = int(told[1])
    if number in _FULL:
        return f"{_FULL[number]}: make room"
    if number == errno.EFBIG:
        return "it is larger than a file may be here (ulimit -f, or the file system): lift that limit"
    return getattr(error, "strerror", None) or str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells of too little memory, on the device or on this machine."""
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is what a collective operation raises when another process does not answer."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__.startswith("Dist") or bool(_LOST.search(str(error)))


def waits_for_gradient(error: BaseException) -> bool:
    """Whether DistributedDataParallel has found a parameter without a gradient, for which the processes wait."""
    return "Expected to have finished reduction" in str(error)


def _sentence(message: str) -> str:
    """What a worker process of a loader raises, PyTorch raises again with the traceback as its message."""
    if not message.startswith("Caught ") or _WORKER not in message:
        return message
    return re.split(r"^planish[\w.]*: ", message.strip(), flags=re.MULTILINE)[-1]


def printable(text: str) -> str:
    """The text with control characters spelled out: a file's name or a label must not command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
