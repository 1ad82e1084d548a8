"""Writing files so that a reader never meets half of one, and a full disk gives a sentence instead of a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planish.errors import PlanishError

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a PlanishError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise PlanishError(
                f"{path}: the disk is full; what was written so far is kept, "
                f"so make room and continue the run with --resume"
            ) from error
        raise PlanishError(f"{path}: cannot write here ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then move it into place: ``path`` holds the old or the new text, never a part."""
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        with open(new, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def short(path: Path) -> Path:
    """The path as seen from the working directory, where it lies inside it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
