"""One uncompressed tar file in the manner of WebDataset: where each image in it lies, and what its label is.

The headers are read once. With this index the images can be read in any order, so that the order of batches stays an
exact function of (seed, epoch), which a stream with a shuffle buffer does not give. The format
(https://github.com/webdataset/webdataset): the files of one sample have the same name up to the first dot of its last
part, and what follows the dot says what each file is.
"""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from planish.errors import PlanishError
from planish.images import EXTENSIONS

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_LABELS = ("cls", "json")
_MOST_BYTES = 1 << 20
"""Of a label; a JSON file with more is not one."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """An image inside a tar file, which is opened whenever it is read.

    Opening costs little beside decoding, and so no worker process has to share an open file with another. ``written``
    is when the tar file was last changed, in nanoseconds.
    """

    shard: Path
    offset: int
    size: int
    name: str
    written: int = 0

    def read_bytes(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.shard} is shorter than when its index was made")
        return data

    @property
    def place(self) -> tuple[str, int]:
        """Sorts members as they lie on the disk."""
        return str(self.shard), self.offset

    @property
    def stamp(self) -> str:
        """Changes when the tar file is written again."""
        return f"{os.path.abspath(self.shard)}|{self.written}|{self.offset}|{self.size}"

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@dataclass
class TarIndex:
    """What a tar file holds: images with their labels, names of images without, and how many samples lack an image."""

    labelled: list[tuple[TarMember, str]]
    unlabelled: list[str]
    imageless: int


def index_tar(path: Path) -> TarIndex:
    """The images of a tar file in the order in which they lie there.

    A label is the integer in ``KEY.cls``, or ``"label"`` in ``KEY.json``, a number or a name.

    Raises:
        PlanishError: the file is compressed, damaged, cut off, or no tar file; a sample has two images, or no valid
            label; an image is stored as a link or with holes.
    """
    images: dict[str, TarMember] = {}
    labels: dict[tuple[str, str], str] = {}
    keys: dict[str, None] = {}
    try:
        _refuse_special(path)
        _refuse_compressed(path)
        written = path.stat().st_mtime_ns
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps the headers of all
                key, kind = _parts(member.name)
                if member.isdir() or not kind or key.rpartition("/")[2].startswith("."):
                    continue
                keys[key] = None
                if f".{kind}" in EXTENSIONS:
                    if key in images:
                        raise PlanishError(
                            f"{path}: the sample {key!r} has two images, {images[key].name} and {member.name}"
                        )
                    images[key] = _image(path, member, written)
                elif kind in _LABELS and (label := _label(path, tar, member, kind)) is not None:
                    labels[key, kind] = label
            _check_end(path, tar.offset)
    except PlanishError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError) as error:
        # the last three where a header promises more bytes than there can be
        why = str(error) or type(error).__name__
        raise PlanishError(f"{path} cannot be read as an uncompressed tar file: {why}") from error
    index = TarIndex([], [], len(keys) - len(images))
    for key, image in images.items():
        found = next((labels[key, kind] for kind in _LABELS if (key, kind) in labels), None)
        if found is None:
            index.unlabelled.append(str(image))
        else:
            index.labelled.append((image, found))
    return index


def _parts(name: str) -> tuple[str, str]:
    """``"a/b.c.JPG"`` -> ``("a/b", "c.jpg")``."""
    folder, slash, last = name.rpartition("/")
    hidden = "." if last.startswith(".") else ""
    stem, _, kind = last[len(hidden) :].partition(".")
    return folder + slash + hidden + stem, kind.lower()


def _refuse_special(path: Path) -> None:
    if not path.is_file():
        raise PlanishError(f"{path} is {'no regular file' if path.exists() else 'not there'}: expected a .tar")


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(6)
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            raise PlanishError(
                f"{path} is compressed ({name}), so that images in it cannot be read in any order: "
                "unpack it to a plain .tar; the images are compressed already"
            )


def _image(path: Path, member: tarfile.TarInfo, written: int) -> TarMember:
    if not member.isreg() or member.issparse():
        raise PlanishError(
            f"{path}: {member.name} is stored as a link or with holes: "
            "write the shard again with whole files (tar --dereference --hard-dereference)"
        )
    return TarMember(path, member.offset_data, member.size, member.name, written)


def _label(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> str | None:
    """The label in a .cls or .json file as text; ``None`` for JSON without one."""
    file = tar.extractfile(member) if member.isreg() and member.size <= _MOST_BYTES else None
    content = b"" if file is None else file.read()
    try:
        value = int(content) if kind == "cls" else json.loads(content)
        if kind == "json":
            value = value.get("label") if isinstance(value, dict) else None
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
                raise ValueError(f"the label is {value!r}")
    except (ValueError, RecursionError) as error:
        expected = 'an integer, such as "7"' if kind == "cls" else 'JSON such as {"label": 7} or {"label": "cat"}'
        raise PlanishError(f"{path}: {member.name} holds no label ({str(error)[:100]}): expected {expected}") from None
    return str(value).strip()


def _check_end(path: Path, offset: int) -> None:
    """Where the reader stopped, zeros must follow: it takes damage in the middle for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(1 << 20)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise PlanishError(
            f"{path} is cut off or damaged: there is no end of a tar file after byte {offset}; write or fetch it again"
        )
