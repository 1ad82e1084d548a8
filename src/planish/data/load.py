"""Images and labels from the embedded data or from a source of the user's."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from planish.data.arrays import BatchedTensorDataset
from planish.data.encoded import EncodedImages
from planish.data.folder import find_folders
from planish.data.listing import Found, drop_unreadable, hash_of, note_overlap, split_listing
from planish.data.manifest import DELIMITERS, find_listed, find_manifests
from planish.data.saved import HUB, find_on_hub, find_saved, is_saved
from planish.data.shards import find_shards, is_shards
from planish.errors import PlanishError
from planish.models.preprocessing import Preprocessing

EMBEDDED = "fashion-mnist"
_ARCHIVE = Path(__file__).parent / "fashion_mnist" / "fashion_mnist_12k.npz"
_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass
class ImageData:
    """Two splits of labelled images. The data sets give (float32 image (C, H, W), normalized; int label).

    ``notes`` are sentences for the user: what was skipped, split or resized; ``content`` is a hash of all images,
    ``skipped`` says why each image that was left out cannot be read.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: list[str]
    name: str
    train_labels: list[int]
    notes: list[str] = field(default_factory=list)
    content: str = ""
    skipped: dict[str, str] = field(default_factory=dict)


def load_data(
    source: str | Path | None,
    preprocessing: Preprocessing,
    *,
    seed: int = 0,
    augment: bool = False,
    limit_bad: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Load the embedded 12,000 Fashion-MNIST images (``None`` or ``"fashion-mnist"``), or images of yours.

    These are in class folders, listed in a CSV file, packed in tar shards, or a data set of Hugging Face ``datasets``,
    saved or by its name on the hub (docs/data.md). Without a split to measure on, 20 % of each class are set aside.
    Every image is decoded once to find the unreadable ones; of a large source, at the next start only what is new.

    Args:
        source: ``DIR`` with ``DIR/train/CLASS/*`` and ``DIR/val/CLASS/*`` (or ``validation``, ``valid``, ``test``, in
            this order), or with ``DIR/CLASS/*``; ``FILE.csv``; ``DIR`` with ``train-*.tar`` and ``val-*.tar``, or
            ``DIR/train-{0000..0009}.tar``; ``DIR`` as ``save_to_disk`` wrote it; ``hf:NAME`` or ``hf:NAME:CONFIG``.
        preprocessing: the model's; decides size, channels and normalization.
        seed: for the split and the augmentation.
        augment: whether ``train`` is augmented; :func:`make_loader` can also decide it for one loader.
        limit_bad: the fraction of unreadable images that is skipped with a note; never more than 100, or 1 % of many.
        progress: called as ``progress(done, total)`` while the images are checked.

    Raises:
        PlanishError: when the source is none of these, or too many of its images are unreadable.
    """
    if source is None or str(source) == EMBEDDED:
        return _load_embedded(preprocessing, seed=seed, augment=augment)
    found = find_images(source)
    root, train, test = found.root, found.train, found.test
    notes, digests, skipped = drop_unreadable(
        found.listings, preprocessing, root=root, limit_bad=limit_bad, progress=progress
    )
    notes += found.notes
    if test is None:
        train, test = split_listing(train, seed)
        notes.append(f"{root} has no test split: 20 % of each class were set aside as one (seed {seed})")
    notes += note_overlap(root, train, test, digests)
    samples, labels = train.flat()
    return ImageData(
        train=EncodedImages(samples, labels, preprocessing, augment=augment, seed=seed),
        test=EncodedImages(*test.flat(), preprocessing, seed=seed),
        classes=list(train.files),
        name=found.name,
        train_labels=labels,
        notes=notes,
        content=hash_of([train, test], digests),
        skipped=skipped,
    )


def find_images(source: str | Path) -> Found:
    """What a source holds, whichever kind it is."""
    if str(source).startswith(HUB):
        return find_on_hub(str(source))
    path = Path(source).expanduser()
    try:
        if is_saved(path):
            return find_saved(path)
        if is_shards(path):
            return find_shards(path)
        if path.is_dir():
            listed = not (path / "train").is_dir() and bool(find_manifests(path))  # class folders come first
        else:
            listed = path.suffix.lower() in DELIMITERS
    except OSError as error:
        raise PlanishError(f"the data {path} cannot be read: {error}") from error
    return find_listed(path) if listed else find_folders(path)


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
