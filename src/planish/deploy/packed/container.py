"""The file around a checkpoint: safetensors, read strictly, with a checksum over all that means something.

A header that is refused costs no more than its own size: the tensors are read only when every name, type, shape and
place in it has been checked against the length of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from planish.deploy.packed.values import is_shape, one_line, shown
from planish.errors import PlanishError

KEY, CHECKSUM, OLD_KEY = "planish_checkpoint", "planish_sha256", "planish_quantized"
HEADER_LIMIT = 4 << 20  # bytes
VALUES_LIMIT = 250_000  # values in the header, so that parsing it stays small beside the file
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: ``begin`` and ``end`` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Table:
    """The header of a file: its tensors by name, its metadata, and where the header ends."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Every error about the content of a file becomes one sentence that names it."""
    try:
        yield
    except PlanishError as error:
        text = one_line(error)
        joint = "" if text.startswith(("is ", "has ", "holds ", "does ")) else ":"  # what is wrong with the file itself
        raise PlanishError(f"{path}{joint} {text}") from None
    except OSError as error:
        raise PlanishError(f"{path} cannot be read: {error.strerror or one_line(error)}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON without names that occur twice, NaN or infinities.

    Raises:
        PlanishError: it is none, in not quite a sentence.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name occurs twice")
        return values

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    if len(text) > HEADER_LIMIT:
        raise PlanishError(f"its metadata have {len(text)} bytes, more than {HEADER_LIMIT}")
    content = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > VALUES_LIMIT:
        raise PlanishError(f"its metadata have more than {VALUES_LIMIT} values")
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        decoded.encode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=no_number)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise PlanishError(f"its metadata cannot be read ({one_line(error) or 'nested too deeply'})") from None


def names_itself(file: BinaryIO) -> bool:
    """Whether the header of an open file, sound or not, speaks of a planish checkpoint of any version."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, HEADER_LIMIT))
    file.seek(0)
    return any(key.encode() in header for key in (KEY, OLD_KEY))


def read_table(file: BinaryIO) -> Table:
    """The header of an open file; see the safetensors format.

    Raises:
        PlanishError: it is no safetensors file, incomplete, or a name, type, shape or place in it is not sound.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise PlanishError("is a torch file (pickle), not a planish checkpoint: planish.load_model reads it as weights")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length < 2:
        raise PlanishError("is no safetensors file")
    if length > HEADER_LIMIT or 8 + length > size:
        raise PlanishError(f"is incomplete or damaged: its header would have {length} bytes of {size}")
    file.seek(8)
    content = file.read(length)
    header = parse_json(content)
    if not isinstance(header, dict):
        raise PlanishError("is damaged: its header holds no names")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PlanishError("is damaged: its metadata are no texts by name")
    entries = {name: _entry(name, value) for name, value in header.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            raise PlanishError(f"is damaged: the tensor {shown(name)} begins at byte {entry.begin} instead of {place}")
        place = entry.end
    if 8 + length + place != size:
        raise PlanishError(f"is incomplete or damaged: it has {size} bytes instead of {8 + length + place}")
    return Table(entries, metadata, 8 + length)


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or sorted(value) != ["data_offsets", "dtype", "shape"]:
        raise PlanishError(f"is damaged: the tensor {shown(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PlanishError(f"the tensor {shown(name)} has the dtype {shown(dtype)}, expected {', '.join(DTYPES)}")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise PlanishError(f"is damaged: the tensor {shown(name)} has no sound shape and offsets")
    entry = Entry(DTYPES[dtype], tuple(shape), *offsets)
    if entry.end - entry.begin != math.prod(shape) * entry.dtype.itemsize:
        raise PlanishError(f"is damaged: the size of the tensor {shown(name)} is not that of its shape")
    return entry


def read_data(file: BinaryIO, table: Table) -> bytearray:
    """The bytes of all tensors, compared with the checksum.

    Raises:
        PlanishError: they, the metadata, or the names and shapes of tensors have been altered.
    """
    data = bytearray(sum(entry.end - entry.begin for entry in table.entries.values()))
    file.seek(table.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise PlanishError("is incomplete: it has become shorter while it was read")
    if table.metadata.get(CHECKSUM) != checksum(table.metadata[KEY], table.entries, data):
        raise PlanishError("has been altered or damaged: its checksum is another")
    return data


def checksum(head: str, entries: Mapping[str, Entry], data: Any) -> str:
    """sha256 of the head, then by sorted name each tensor's name, dtype and shape (as JSON, one line) and its bytes."""
    digest, whole = hashlib.sha256(head.encode()), memoryview(data)
    for name, entry in sorted(entries.items()):
        digest.update(json.dumps([name, NAMES[entry.dtype], list(entry.shape)]).encode() + b"\n")
        digest.update(whole[entry.begin : entry.end])
    return digest.hexdigest()


def tensor_at(data: bytearray, entry: Entry) -> Tensor:
    """A tensor that shares its memory with the bytes of the file; clone it to keep it."""
    if entry.end == entry.begin:
        return torch.empty(entry.shape, dtype=entry.dtype)
    count = math.prod(entry.shape)
    return torch.frombuffer(data, dtype=entry.dtype, count=count, offset=entry.begin).view(entry.shape)


def to_bytes(tensors: Mapping[str, Tensor], head: str) -> bytes:
    """A whole file of these tensors, with its checksum: the same bytes for the same content.

    The widest types come first, so that every tensor begins at a multiple of its item's size; one that shares memory
    with another is written in full.
    """
    entries: dict[str, Entry] = {}
    parts, place = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        part = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = Entry(tensor.dtype, tuple(tensor.shape), place, place + len(part))
        parts.append(part)
        place += len(part)
    data = b"".join(parts)
    header: dict[str, Any] = {"__metadata__": {KEY: head, CHECKSUM: checksum(head, entries, data)}}
    for name, entry in entries.items():
        header[name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise PlanishError(f"the metadata of the model take {len(text)} bytes, more than {HEADER_LIMIT}")
    return len(text).to_bytes(8, "little") + text + data
