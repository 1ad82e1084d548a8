"""The one exception that a user is meant to read."""

from __future__ import annotations

import re

_WORKER = "\nOriginal Traceback"


class PlanishError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_sentence(message))


def _sentence(message: str) -> str:
    """What a worker process of a loader raises, PyTorch raises again with the traceback as its message."""
    if not message.startswith("Caught ") or _WORKER not in message:
        return message
    return re.split(r"^planish[\w.]*: ", message.strip(), flags=re.MULTILINE)[-1]


def printable(text: str) -> str:
    """The text with control characters spelled out: a file's name or a label must not command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
