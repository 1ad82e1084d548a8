"""What is known of images that were decoded before, so that a large source is decoded once and not at every start.

A table in the user's cache folder, one a source: a hash of the image's place, size and time of change, and beside it
the hash of its bytes and its width and height. Names of files do not stand in it. Only images that could be read are
kept; the others are tried again. The table may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL

WORTH = 2000
"""Images; fewer are decoded in the time in which a user reads the first lines."""
_VARIABLES = 500  # of one question to the table
_TABLE = "CREATE TABLE IF NOT EXISTS images (key BLOB PRIMARY KEY, digest BLOB, width INT, height INT) WITHOUT ROWID"


class Scanned(NamedTuple):
    """A readable image: the hash of its bytes, and its sides as one sees it (upright)."""

    digest: bytes
    width: int
    height: int


def cache_folder() -> Path | None:
    """``$PLANISH_CACHE``, else ``planish`` in the user's cache folder; ``None`` where the variable is empty."""
    given = os.environ.get("PLANISH_CACHE")
    if given is not None:
        return Path(given).expanduser() if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "planish"


def key_of(source: Any) -> bytes | None:
    """A hash that changes when the image may have changed, or the decoder; ``None`` where its changes are hidden."""
    try:
        if isinstance(source, Path):
            found = source.stat()
            stamp: str | None = f"{os.path.abspath(source)}|{found.st_size}|{found.st_mtime_ns}"
        else:
            stamp = getattr(source, "stamp", None)
    except OSError:
        return None  # reading it will say why
    if stamp is None:
        return None
    text = f"1|{PIL.__version__}|{stamp}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()


class ScanCache:
    """The table of one source. Whatever is wrong with it, the images are decoded, and ``trouble`` says what it was."""

    def __init__(self, path: Path) -> None:
        self.path, self.trouble = path, ""
        self._table: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._table = sqlite3.connect(path, timeout=10.0)
            self._table.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    @classmethod
    def of(cls, root: Path, images: int) -> ScanCache | None:
        """The table of a source; ``None`` for one with few images, or where there is no folder for it."""
        folder = cache_folder()
        if folder is None or images < WORTH:
            return None
        name = hashlib.blake2b(os.path.abspath(root).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return cls(folder / f"images-{name}.sqlite")

    def look_up(self, keys: Sequence[bytes | None]) -> dict[bytes, Scanned]:
        """What is known, by key."""
        found: dict[bytes, Scanned] = {}
        asked = [key for key in keys if key is not None]
        for part in _parts(asked):
            marks = ",".join("?" * len(part))
            rows = self._run(f"SELECT key, digest, width, height FROM images WHERE key IN ({marks})", part)
            for key, digest, width, height in rows:
                if (
                    isinstance(digest, bytes)
                    and len(digest) == 16
                    and isinstance(width, int)
                    and isinstance(height, int)
                ):
                    found[key] = Scanned(digest, width, height)
        return found

    def add(self, found: Mapping[bytes, Scanned]) -> None:
        """Keep these, on disk when this returns: a check that is interrupted goes on where it was."""
        if self._table is None or not found:
            return
        try:
            with self._table:
                rows = [(key, *scanned) for key, scanned in found.items()]
                self._table.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Give the file back."""
        if self._table is not None:
            self._table.close()
            self._table = None

    def _run(self, question: str, values: Sequence[Any]) -> list[Any]:
        if self._table is None:
            return []
        try:
            return self._table.execute(question, values).fetchall()
        except (sqlite3.Error, TypeError) as error:
            self._give_up(error)
            return []

    def _give_up(self, error: Exception) -> None:
        self.trouble = str(error)
        self.close()


def _parts(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    return (keys[start : start + _VARIABLES] for start in range(0, len(keys), _VARIABLES))
