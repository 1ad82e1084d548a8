"""The same pictures in every form in which they can be given."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from planish.data import ImageData


def encoded(seed: int, mode: str = "RGB", ending: str = "png", size: tuple[int, int] = (12, 10)) -> bytes:
    """Noise as the bytes of an image file."""
    generator = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, size, np.uint16))
    else:
        channels = len(mode)
        pixels = generator.integers(0, 256, (*size, channels), np.uint8)
        image = Image.fromarray(pixels if channels > 1 else pixels[..., 0], mode=mode)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if seed % 2 else 1  # lies on its side
    image.save(buffer, {"jpg": "JPEG"}.get(ending, ending.upper()), exif=exif)
    return buffer.getvalue()


KINDS = (("RGB", "png"), ("L", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("RGBA", "webp"), ("RGB", "jpg"))


def pictures(names=("ant", "bee", "cow"), each: int = 6) -> dict[str, bytes]:
    """``CLASS/FILE`` -> bytes: images of every mode, some on their side."""
    found = {}
    for number, name in enumerate(names):
        for i in range(each):
            mode, ending = KINDS[i % len(KINDS)]
            found[f"{name}/{i:03}.{ending}"] = encoded(100 * number + i, mode, ending)
    return found


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def as_samples(files: dict[str, bytes], names: list[str], labels: str = "cls") -> dict[str, bytes]:
    """``CLASS/FILE`` as the members of a shard: the image, and its label as ``.cls`` (a number) or in a ``.json``."""
    members = {}
    for name, data in files.items():
        key, _, ending = name.rpartition(".")
        label = name.partition("/")[0]
        members[f"{key}.{ending}"] = data
        if labels == "cls":
            members[f"{key}.cls"] = str(names.index(label)).encode()
        else:
            members[f"{key}.json"] = json.dumps({"label": label, "width": 10}).encode()
    return members


def assert_same(one: ImageData, other: ImageData) -> None:
    """Both give the same tensors, labels, classes and splits, in the same order."""
    assert one.classes == other.classes
    assert one.train_labels == other.train_labels
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert len(a) == len(b)
        assert a.labels == b.labels
        assert all(torch.equal(a[i][0], b[i][0]) for i in range(len(a)))
