"""Images and labels from the embedded data or from a folder."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from planish.data.arrays import BatchedTensorDataset
from planish.data.folder import FolderImages, Listing, drop_unreadable, find_splits, split_listing
from planish.errors import PlanishError
from planish.models.preprocessing import Preprocessing

EMBEDDED = "fashion-mnist"
_ARCHIVE = Path(__file__).parent / "fashion_mnist" / "fashion_mnist_12k.npz"
_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass
class ImageData:
    """Two splits of labelled images. The data sets give (float32 image (C, H, W), normalized; int label).

    ``notes`` are sentences for the user: what was skipped, split or resized.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: list[str]
    name: str
    train_labels: list[int]
    notes: list[str] = field(default_factory=list)


def load_data(
    source: str | Path | None,
    preprocessing: Preprocessing,
    *,
    seed: int = 0,
    augment: bool = False,
    limit_bad: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load the embedded 12,000 Fashion-MNIST images (``None`` or ``"fashion-mnist"``) or a folder of class folders.

    A folder is ``DIR/train/CLASS/*`` with ``DIR/val/CLASS/*`` (or ``validation``, ``valid``, ``test``, in this order),
    or ``DIR/CLASS/*``, which is split 80/20 within each class. Every image is decoded once to find the unreadable ones.

    Args:
        preprocessing: the model's; decides size, channels and normalization.
        seed: for the split and the augmentation.
        augment: whether ``train`` is augmented; :func:`make_loader` can also decide it for one loader.
        limit_bad: the fraction of unreadable images that is skipped with a note; never more than 100.
        progress: called as ``progress(done, total)`` while the images of a folder are checked.

    Raises:
        PlanishError: when the folder is not such a folder, or too many of its images are unreadable.
    """
    if source is None or str(source) == EMBEDDED:
        return _load_embedded(preprocessing, seed=seed, augment=augment)
    root = Path(source).expanduser()
    train, test = find_splits(root)
    listings = [train] if test is None else [train, test]
    notes = drop_unreadable(listings, preprocessing.input_size[0], root=root, limit_bad=limit_bad, progress=progress)
    if other := sum(listing.other for listing in listings):
        notes.append(f"{other} files in {root} are not named like images and were left out")
    if test is None:
        train, test = split_listing(train, seed)
        notes.append(f"{root} has no test split: 20 % of each class were set aside as one (seed {seed})")
    classes = list(train.files)
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        notes.append("the class folders are numbered in the order of their names as text: '10' comes before '2'")
    train_paths, train_labels = _flat(train)
    return ImageData(
        train=FolderImages(train_paths, train_labels, preprocessing, augment=augment, seed=seed),
        test=FolderImages(*_flat(test), preprocessing, seed=seed),
        classes=classes,
        name=root.resolve().name,
        train_labels=train_labels,
        notes=notes,
    )


def _flat(listing: Listing) -> tuple[list[Path], list[int]]:
    classes = sorted(listing.files)
    pairs = [(path, label) for label, name in enumerate(classes) for path in listing.files[name]]
    return [path for path, _ in pairs], [label for _, label in pairs]


def _load_embedded(preprocessing: Preprocessing, *, seed: int, augment: bool) -> ImageData:
    try:
        with np.load(_ARCHIVE, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("train_images", "train_labels", "test_images", "test_labels")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PlanishError(f"the embedded images {_ARCHIVE} cannot be read ({error}): reinstall planish") from error
    notes = []
    size, native = preprocessing.input_size, (1, *arrays["train_images"].shape[1:])
    if size != native:
        shapes = [" x ".join(map(str, shape)) for shape in (native, size)]
        notes.append(f"the embedded images are brought from {shapes[0]} to the model's {shapes[1]}")
    train_labels = arrays["train_labels"]
    return ImageData(
        train=BatchedTensorDataset(arrays["train_images"], train_labels, preprocessing, augment=augment, seed=seed),
        test=BatchedTensorDataset(arrays["test_images"], arrays["test_labels"], preprocessing, seed=seed),
        classes=list(_CLASSES),
        name=EMBEDDED,
        train_labels=train_labels.astype(int).tolist(),
        notes=notes,
    )
