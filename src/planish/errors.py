"""The exceptions that a user is meant to read."""

from __future__ import annotations

import errno
import re

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}

_WORKER = "\nOriginal Traceback"


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


def _sentence(message: str) -> str:
    """What a worker process of a loader raises, PyTorch raises again with the traceback as its message."""
    if not message.startswith("Caught ") or _WORKER not in message:
        return message
    return re.split(r"^planish[\w.]*: ", message.strip(), flags=re.MULTILINE)[-1]


def printable(text: str) -> str:
    """The text with control characters spelled out: a file's name or a label must not command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
