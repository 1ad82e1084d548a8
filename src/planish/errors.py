"""The exceptions that a user is meant to read."""

from __future__ import annotations

import errno
import re

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


class PlanishError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


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
