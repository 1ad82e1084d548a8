"""Class folders on disk: what is in them, which images are readable, how they are split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from planish.data.decode import find_unreadable
from planish.data.randomness import draw
from planish.errors import PlanishError
from planish.images import EXTENSIONS, decode, list_images, reversed_channels
from planish.models.preprocessing import Preprocessing

MAX_BAD = 100
TEST_FRACTION = 0.2
_TEST_NAMES = ("val", "validation", "valid", "test")


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Image files, decoded when they are asked for and transformed as timm's evaluation transform does.

    With ``augment``, a random crop of 60 to 100 % of the area is resized instead, and half of the images are mirrored;
    what happens to a sample depends on (seed, epoch, index) alone. ``dataset[i]`` is (float32 (C, H, W), label).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        from timm.data import create_transform
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms as tv

        self.paths, self.labels = list(paths), [int(label) for label in labels]
        self.preprocessing, self.augment, self.seed, self.epoch = preprocessing, augment, seed, 0
        p = preprocessing
        self._plain: Any = create_transform(
            p.input_size,
            mean=p.mean,
            std=p.std,
            interpolation=p.interpolation,
            crop_pct=p.crop_pct,
            crop_mode=p.crop_mode,
        )
        mode = str_to_interp_mode("bicubic" if p.interpolation == "random" else p.interpolation)
        crop = tv.RandomResizedCrop(p.input_size[1:], scale=(0.6, 1.0), interpolation=mode)
        self._random: Any = tv.Compose([crop, tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(p.mean, p.std)])

    def __len__(self) -> int:
        return len(self.paths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are given out."""
        self.epoch = epoch

    def augmented(self, on: bool = True) -> FolderImages:
        """The same images with or without augmentation."""
        other = copy.copy(self)
        other.augment = on
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            image = decode(path, self.preprocessing.input_size[0])
        except Exception as error:
            raise PlanishError(f"{path} could be read when the data were loaded and cannot now: {error}") from error
        if self.preprocessing.channel_order == "bgr":
            image = reversed_channels(image)
        if not self.augment:
            return self._plain(image), self.labels[index]
        key = int(draw(self.seed, self.epoch, np.array([index % len(self)]), 1)[0, 0] >> np.uint64(1))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(key)
            return self._random(image), self.labels[index]


@dataclass
class Listing:
    """The image files of one split, by class name; ``other`` counts files with another ending."""

    root: Path
    files: dict[str, list[Path]]
    other: int = 0


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


def find_splits(root: Path) -> tuple[Listing, Listing | None]:
    """The training listing and, where the folder holds one, the test listing.

    Raises:
        PlanishError: for a folder that is missing, unreadable, empty, without class folders, with a single class, with
            an empty class, or with different classes in its two splits.
    """
    expected = "expected DIR/train/CLASS/*.png with DIR/val/CLASS/*.png, or DIR/CLASS/*.png"
    if not root.exists():
        raise PlanishError(f"the data folder {root} does not exist: {expected}")
    if not root.is_dir():
        raise PlanishError(f"{root} is a file, not a data folder: {expected}")
    try:
        if not any(root.iterdir()):
            raise PlanishError(f"the data folder {root} is empty: {expected}")
        top = {folder.name.lower(): folder for folder in reversed(_visible_folders(root))}
        split = "train" in top and bool(_visible_folders(top["train"]))
        train = list_classes(top["train"] if split else root)
        held_out = next((top[name] for name in _TEST_NAMES if split and name in top), None)
        test = list_classes(held_out) if held_out is not None else None
    except OSError as error:
        raise PlanishError(f"the data folder {root} cannot be read: {error}") from error
    for listing in (train, test) if test is not None else (train,):
        _check(listing, expected)
    if test is not None and (differing := sorted(set(train.files) ^ set(test.files))):
        names = ", ".join(f"{n!r} only in {(train if n in train.files else test).root.name}" for n in differing[:3])
        raise PlanishError(
            f"{root}: the training and test folders must hold the same classes, {len(differing)} differ: {names}"
        )
    return train, test


def _check(listing: Listing, expected: str) -> None:
    root, files = listing.root, listing.files
    if not files:
        raise PlanishError(f"{root} holds no class folders: {expected}")
    if not any(files.values()):
        raise PlanishError(f"the class folders of {root} hold no images ({' '.join(sorted(EXTENSIONS))}): {expected}")
    if len(files) == 1:
        raise PlanishError(
            f"{root} holds one class only ({next(iter(files))!r}): a classifier needs at least two classes"
        )
    if empty := [name for name, found in files.items() if not found]:
        raise PlanishError(
            f"{root}: the class folder {empty[0]!r} holds no images ({len(empty)} such folders): fill or remove it"
        )


def drop_unreadable(
    listings: Sequence[Listing],
    channels: int,
    *,
    root: Path,
    limit_bad: float,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Decode all images of the listings, take the bad ones out of them and describe these.

    Raises:
        PlanishError: when more than ``limit_bad`` (a fraction) of the images or more than 100 are bad, or when a class
            is left without images.
    """
    paths = [path for listing in listings for found in listing.files.values() for path in found]
    bad = {paths[i]: reason for i, reason in find_unreadable(paths, channels, progress).items()}
    if not bad:
        return []
    named = "; ".join(f"{path.relative_to(root)} ({reason})" for path, reason in list(bad.items())[:5])
    named += f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    if len(bad) > MAX_BAD or len(bad) > limit_bad * len(paths):
        raise PlanishError(
            f"{root}: {len(bad)} of {len(paths)} images cannot be read, more than the {limit_bad:.0%} "
            f"(at most {MAX_BAD}) that are skipped; repair or remove them: "
            f"{named}"
        )
    for listing in listings:
        for name, found in listing.files.items():
            listing.files[name] = [path for path in found if path not in bad]
            if not listing.files[name]:
                raise PlanishError(f"{listing.root}: no image of the class {name!r} can be read: {named}")
    return [f"{len(bad)} of {len(paths)} images could not be read and were skipped: {named}"]


def split_listing(listing: Listing, seed: int) -> tuple[Listing, Listing]:
    """A class-balanced random 80/20 split, a function of the seed and of the files in each class.

    Raises:
        PlanishError: for a class with a single image.
    """
    generator = np.random.default_rng([seed & (2**63 - 1), 80])
    train, test = Listing(listing.root, {}), Listing(listing.root, {})
    for name, found in listing.files.items():
        if len(found) < 2:
            raise PlanishError(
                f"{listing.root}: the class {name!r} has one image; a split into training and test needs two or more"
            )
        order = generator.permutation(len(found))
        held = set(order[: max(1, round(TEST_FRACTION * len(found)))].tolist())
        train.files[name] = [path for i, path in enumerate(found) if i not in held]
        test.files[name] = [path for i, path in enumerate(found) if i in held]
    return train, test
