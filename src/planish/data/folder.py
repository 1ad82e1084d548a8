"""Class folders on disk: what is in them, and whether they hold two splits."""

from __future__ import annotations

from pathlib import Path

from planish.data.listing import TEST_NAMES, Found, Listing, check_same_classes
from planish.errors import PlanishError
from planish.images import EXTENSIONS, list_images

_EXPECTED = "expected DIR/train/CLASS/*.png with DIR/val/CLASS/*.png, or DIR/CLASS/*.png"


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def list_classes(root: Path) -> Listing:
    """Files below each class folder of ``root`` (also in folders inside it), sorted by name, hidden ones left out.

    Classes are in the order of their names as text, as in torchvision's ``ImageFolder``.
    """
    listing = Listing(root, {})
    for folder in _visible_folders(root):
        listing.files[folder.name], other = list_images(folder)
        listing.other += other
    return listing


def find_folders(root: Path) -> Found:
    """The training listing and, where the folder holds one, the test listing.

    Raises:
        PlanishError: for a folder that is missing, unreadable, empty, without class folders, with a single class, with
            an empty class, or with different classes in its two splits.
    """
    if not root.exists():
        raise PlanishError(f"the data folder {root} does not exist: {_EXPECTED}")
    if not root.is_dir():
        raise PlanishError(
            f"{root} is a file, not a data folder: {_EXPECTED}, or a file whose name ends in .csv, .tsv or .tar"
        )
    try:
        if not any(root.iterdir()):
            raise PlanishError(f"the data folder {root} is empty: {_EXPECTED}")
        top = {folder.name.lower(): folder for folder in reversed(_visible_folders(root))}
        split = "train" in top and bool(_visible_folders(top["train"]))
        train = list_classes(top["train"] if split else root)
        held_out = next((top[name] for name in TEST_NAMES if split and name in top), None)
        test = list_classes(held_out) if held_out is not None else None
    except OSError as error:
        raise PlanishError(f"the data folder {root} cannot be read: {error}") from error
    found = Found(root.resolve().name, root, train, test)
    for listing in found.listings:
        _check(listing)
    if test is not None:
        check_same_classes(root, train, test, (train.root.name, test.root.name))
    if other := sum(listing.other for listing in found.listings):
        found.notes.append(f"{other} files in {root} are not named like images and were left out")
    if all(name.isdecimal() for name in train.files) and list(train.files) != sorted(train.files, key=int):
        found.notes.append("the class folders are numbered in the order of their names as text: '10' comes before '2'")
    return found


def _check(listing: Listing) -> None:
    root, files = listing.root, listing.files
    if not files:
        raise PlanishError(f"{root} holds no class folders: {_EXPECTED}")
    if not any(files.values()):
        raise PlanishError(f"the class folders of {root} hold no images ({' '.join(sorted(EXTENSIONS))}): {_EXPECTED}")
    if len(files) == 1:
        raise PlanishError(
            f"{root} holds one class only ({next(iter(files))!r}): a classifier needs at least two classes"
        )
    if empty := [name for name, found in files.items() if not found]:
        raise PlanishError(
            f"{root}: the class folder {empty[0]!r} holds no images ({len(empty)} such folders): fill or remove it"
        )
