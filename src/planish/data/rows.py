"""Sources that say each image's label: from (sample, label, split) to the samples of each class of each split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planish.data.decode import Encoded
from planish.data.listing import TEST_NAMES, Found, Listing, check_same_classes
from planish.errors import PlanishError

_NUMBER = re.compile(r"([+-]?\d+)(\.0+)?")  # pandas writes 3 as 3.0 where a value of the column is missing
TRAIN_NAMES = ("train", "training")


@dataclass(frozen=True)
class Labelled:
    """One image of a source: its label as text, a name or a number; its split, or ``None`` where nothing says it."""

    sample: Encoded
    label: str
    split: str | None = None


def choose_splits(where: object, names: Iterable[str]) -> tuple[str, str | None, list[str]]:
    """Which of the splits that a source names (in lower case) is trained on, which measured on; which stay unused.

    Raises:
        PlanishError: none of them is called train.
    """
    present = set(names)
    train = next((name for name in TRAIN_NAMES if name in present), None)
    if train is None:
        told = ", ".join(map(repr, sorted(present))) or "none"
        raise PlanishError(f"{where}: its splits are {told}, and none is called 'train': planish needs training images")
    test = next((name for name in TEST_NAMES if name in present), None)
    return train, test, sorted(present - {train, test})


def arrange(name: str, root: Path, rows: Sequence[Labelled], classes: Sequence[str] | None = None) -> Found:
    """The samples of each class and split, in the order of the rows.

    Without ``classes`` these are the labels that occur: in the order of their numbers if all are integers, otherwise in
    the order of their names as text, as with class folders. With ``classes``, a label that is an integer is a number of
    one of them, from 0, any other label its name; and a class may be without images.

    Raises:
        PlanishError: for no images, labels that name no class, a single class, or splits with different classes.
    """
    if not rows:
        raise PlanishError(f"{root} lists no images: planish needs images of two or more classes")
    train, test, notes = _which(root, rows)
    rows = [row for row in rows if row.split in (train, test)]
    declared = classes is not None
    labels, classes, renumbered = _classes(root, [row.label for row in rows], classes)
    if len(classes) == 1:
        raise PlanishError(f"{root} holds one class only ({classes[0]!r}): a classifier needs at least two classes")
    listings = {split: Listing(root, {c: [] for c in classes}) for split in (train, test)}
    for row, label in zip(rows, labels, strict=True):
        listings[row.split].files[label].append(row.sample)
    found = Found(name, root, listings[train], None if test is None else listings[test], notes + renumbered)
    if not declared and found.test is not None:
        for listing in found.listings:
            listing.files = {c: samples for c, samples in listing.files.items() if samples}
        check_same_classes(root, found.train, found.test, ("the training split", "the test split"))
    return found


def _which(root: Path, rows: Sequence[Labelled]) -> tuple[str | None, str | None, list[str]]:
    """The splits to train and to measure on, and a note on others."""
    counts = Counter(row.split for row in rows)
    if set(counts) == {None}:
        return None, None, []
    train, test, unused = choose_splits(root, (name for name in counts if name is not None))
    told = ", ".join(f"{split!r} ({counts[split]} images)" for split in unused)
    return train, test, [f"{root}: {told} left out; {train!r} and {test!r} are used"] if unused else []


def _classes(root: Path, labels: list[str], known: Sequence[str] | None) -> tuple[list[str], Sequence[str], list[str]]:
    """The label of each image as the name of a class, the classes, and a note where numbers changed."""
    numbers = _numbers(root, labels)
    if known is not None:
        return _named(root, labels, numbers, known), known, []
    if numbers is None:
        return labels, sorted(set(labels)), []
    used, notes = sorted(set(numbers)), []
    if used != list(range(len(used))):
        notes.append(
            f"the labels are {len(used)} numbers from {used[0]} to {used[-1]}: "
            f"the classes are numbered 0 to {len(used) - 1} in their order"
        )
    return [str(number) for number in numbers], [str(number) for number in used], notes


def _numbers(root: Path, labels: Sequence[str]) -> list[int] | None:
    """The labels as integers, or ``None`` unless all are."""
    matches = [_NUMBER.fullmatch(label) for label in labels]
    if not all(matches):
        return None
    numbers = [int(match[1]) for match in matches if match]
    if min(numbers) < 0:
        count = sum(number < 0 for number in numbers)
        raise PlanishError(
            f"{root}: {count} of {len(labels)} labels are below 0 (the first is {next(n for n in numbers if n < 0)}): "
            "leave out images whose label is not known, and number the classes from 0"
        )
    return numbers


def _named(root: Path, labels: list[str], numbers: list[int] | None, classes: Sequence[str]) -> list[str]:
    """Every label as the name of one of ``classes``."""
    if numbers is not None:
        if max(numbers) >= len(classes):
            raise PlanishError(
                f"{root}: the label {max(numbers)} names none of the {len(classes)} classes, "
                f"which are numbered 0 to {len(classes) - 1}"
            )
        return [classes[number] for number in numbers]
    if unknown := sorted(set(labels) - set(classes)):
        told = ", ".join(map(repr, unknown[:3]))
        raise PlanishError(f"{root}: {len(unknown)} labels name none of the {len(classes)} classes: {told}")
    return labels


def read_classes(folder: Path) -> list[str] | None:
    """The names in ``classes.txt``, one a line in the order of the labels; ``None`` without such a file.

    Raises:
        PlanishError: the file cannot be read, is empty, or holds a name twice or an empty line.
    """
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise PlanishError(f"{path} cannot be read: {error}") from error
    if not all(lines):
        raise PlanishError(f"{path} has an empty line: expected the name of a class on every line, in the label order")
    if twice := [name for name, count in Counter(lines).items() if count > 1]:
        raise PlanishError(f"{path} names the class {twice[0]!r} twice: expected every class once")
    return lines
