"""Which tar shards a source names, and what they hold; :mod:`planish.data.tar` reads one of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from planish.data.listing import TEST_NAMES, Found, enumerated
from planish.data.rows import TRAIN_NAMES, Labelled, arrange, choose_splits, read_classes
from planish.data.tar import index_tar
from planish.errors import PlanishError

_ENDING = r"\.(tar(\.(gz|bz2|xz|zst|lz4|Z))?|tgz|tbz2?|txz)"  # compressed ones too, to say that they will not do
_TAR = re.compile(rf".*{_ENDING}", re.IGNORECASE)
_SHARD = re.compile(rf"({'|'.join((*TRAIN_NAMES, *TEST_NAMES))})([-_.].*)?{_ENDING}", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST = 100_000
_EXPECTED = "expected a folder with train-*.tar and val-*.tar, or train-{0000..0009}.tar"


def is_shards(path: Path) -> bool:
    """Whether the path names a tar file, a range of them, or a folder with ``train-*.tar`` or the like."""
    if path.is_dir():
        return any(_split_of(file) for file in path.iterdir())
    return _TAR.fullmatch(path.name) is not None


def find_shards(path: Path) -> Found:
    """The samples of the shards, in the order in which they lie there; classes are named by ``classes.txt`` beside.

    A range, ``train-{0000..0009}.tar``, names the training shards; those beside it that are named ``val-*.tar`` (or
    validation, valid, test) are the test split, as they are in a folder.

    Raises:
        PlanishError: for shards that are missing, compressed or damaged, and images without a label.
    """
    if path.is_dir():
        folder, name = path, path.resolve().name
        shards = [(file, split) for file in sorted(path.iterdir()) if (split := _split_of(file))]
    else:
        files = expand(path)
        folder, name = files[0].parent, _stem(path)
        shards = [(file, "") for file in files]
        if _split_of(files[0]) in TRAIN_NAMES:
            beside = [(file, split) for file in sorted(folder.iterdir()) if (split := _split_of(file)) in TEST_NAMES]
            shards = [(file, "train") for file in files] + beside
    rows, notes = _samples(path, shards)
    found = arrange(name, path, rows, read_classes(folder))
    found.notes += notes
    return found


def expand(path: Path) -> list[Path]:
    """``train-{08..10}.tar`` -> three files, all of which are there, numbered like Bash's sequence expressions.

    Raises:
        PlanishError: for a range that ends before it begins, or files that are missing.
    """
    pieces = _RANGE.split(str(path))  # text, first, last, text, first, last, text
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MOST:
            raise PlanishError(f"{path}: the range {{{first}..{last}}} holds no or too many numbers; {_EXPECTED}")
        padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        ranges.append([f"{number:0{width}}" for number in numbers])
    files = []
    for chosen in itertools.islice(itertools.product(*ranges), _MOST):
        texts = itertools.zip_longest(pieces[::3], chosen, fillvalue="")
        files.append(Path("".join(text for pair in texts for text in pair)))
    if missing := [str(file) for file in files if not file.is_file()]:
        raise PlanishError(f"{len(missing)} of {len(files)} shards do not exist: {enumerated(missing)}; {_EXPECTED}")
    return files


def _samples(where: Path, shards: Sequence[tuple[Path, str]]) -> tuple[list[Labelled], list[str]]:
    """The samples of the shards in use, each with the split of its shard ("": nothing says it), and notes on others."""
    splits = {split for _, split in shards} - {""}
    train, test, unused = choose_splits(where, splits) if splits else ("", None, [])
    notes = [f"{where}: shards of the split {' and '.join(unused)} were left out"] if unused else []
    rows, unlabelled, imageless = [], [], 0
    for shard, split in shards:
        if split in (train, test):
            index = index_tar(shard)
            rows += [Labelled(image, label, split or None) for image, label in index.labelled]
            unlabelled += index.unlabelled
            imageless += index.imageless
    if unlabelled:
        raise PlanishError(
            f"{where}: {len(unlabelled)} of {len(rows) + len(unlabelled)} images have no label: "
            f'{enumerated(unlabelled)}; expected KEY.cls with an integer or KEY.json with "label" beside KEY.jpg'
        )
    if imageless and not rows:
        raise PlanishError(
            f"{where}: none of {imageless} samples has an image: expected KEY.jpg, KEY.png or KEY.webp beside KEY.cls, "
            "without a dot in KEY"
        )
    if imageless:
        notes.append(f"{imageless} samples in {where} have no image and were left out")
    return rows, notes


def _split_of(file: Path) -> str:
    """``train-0001.tar`` -> ``train``; "" for a file that is not named like a shard of a split."""
    match = _SHARD.fullmatch(file.name)
    return match[1].lower() if match and file.is_file() else ""


def _stem(path: Path) -> str:
    """``my-{00..10}.tar`` -> ``my``."""
    return re.split(r"[{.]", path.name)[0].rstrip("-_") or path.resolve().parent.name
