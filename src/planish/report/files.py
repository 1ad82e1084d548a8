"""Writing files so that a reader never meets half of one, and a full disk gives a sentence instead of a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planish.errors import NotWritten, why_not_written
from planish.report.plain import to_plain


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a :class:`NotWritten` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise NotWritten(f"{path}: cannot write here ({why_not_written(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, then move it into place: ``path`` holds the old or the new text, never a part."""
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        with open(new, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def append_json(path: Path, event: Mapping[str, Any]) -> None:
    """Append an event to a file as one JSON object on one line, on its way to the disk when this returns; NaN as null.

    Raises:
        NotWritten: the disk is full or not writable.
    """
    line = (to_json(to_plain(event)) + "\n").encode("utf-8", "backslashreplace")
    with writing(path), open(path, "ab", buffering=0) as file:
        while line:
            line = line[file.write(line) :]


def drop_torn_line(path: Path) -> None:
    """An interrupted write can leave half a line at the end of a log; the next event must not join it."""
    if path.is_file():
        with writing(path), open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with the characters as they are; NaN is an error."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)


def short(path: Path) -> Path:
    """The path as seen from the working directory, where it lies inside it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
