"""What a source holds: the samples of each class; and what is done alike for all sources: checking and splitting."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planish.data.decode import Encoded, check_images
from planish.data.scanned import ScanCache
from planish.errors import PlanishError
from planish.preprocessing import Preprocessing

MAX_BAD = 100
MAX_SHARE = 0.01
"""Of the images of a large source: it may have more bad ones than :data:`MAX_BAD`."""
TEST_FRACTION = 0.2
TEST_NAMES = ("val", "validation", "valid", "test")
"""What the split to measure on may be called; the first that is there counts."""


@dataclass
class Listing:
    """The samples of one split, by class name, in the order of the class numbers.

    Attributes:
        root: what the user named, for messages: a folder, a file, ``hf:NAME``.
        other: how many files were left out because they are not named like images.
    """

    root: Path
    files: dict[str, list[Any]]
    other: int = 0

    def flat(self) -> tuple[list[Encoded], list[int]]:
        """All samples, class by class, and the class number of each."""
        pairs = [(sample, label) for label, found in enumerate(self.files.values()) for sample in found]
        return [sample for sample, _ in pairs], [label for _, label in pairs]

    def __iter__(self) -> Iterator[Encoded]:
        return (sample for found in self.files.values() for sample in found)

    def __len__(self) -> int:
        return sum(map(len, self.files.values()))


@dataclass
class Found:
    """What a source gives: the training split, the test split where it has one, and notes for the user."""

    name: str
    root: Path
    train: Listing
    test: Listing | None
    notes: list[str] = field(default_factory=list)

    @property
    def listings(self) -> list[Listing]:
        """Those that there are."""
        return [self.train] if self.test is None else [self.train, self.test]


def check_same_classes(root: Path, train: Listing, test: Listing, names: tuple[str, str]) -> None:
    """Raise PlanishError unless both splits, which messages call ``names``, hold the same classes."""
    if differing := sorted(set(train.files) ^ set(test.files)):
        told = ", ".join(f"{n!r} only in {names[0] if n in train.files else names[1]}" for n in differing[:3])
        raise PlanishError(
            f"{root}: the training and test images must be of the same classes, {len(differing)} differ: {told}"
        )


def drop_unreadable(
    listings: Sequence[Listing],
    preprocessing: Preprocessing,
    *,
    root: Path,
    limit_bad: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[str], dict[Encoded, bytes], dict[str, str]]:
    """Decode all images of the listings, take the bad ones out of them and describe these.

    Of a source with many images, those that were decoded before and did not change since are not decoded again.

    Returns:
        the notes, the hash of the encoded bytes of every image that is left, and the reason for each that is not.

    Raises:
        PlanishError: when more than ``limit_bad`` (a fraction) of the images are bad, or more than 100 (1 % where that
            is more), or when a class is left without images.
    """
    samples = [sample for listing in listings for sample in listing]
    samples.sort(key=lambda sample: getattr(sample, "place", ()))  # stable: without places the order stays
    cache = ScanCache.of(root, len(samples))
    checked = check_images(samples, preprocessing, progress, cache)
    notes = []
    if cache is not None:
        cache.close()
        if cache.trouble:
            notes.append(f"{cache.path} cannot be used ({cache.trouble}), so all images are decoded again next time")
    digests = {samples[i]: digest for i, digest in checked.digests.items()}
    bad = {samples[i]: reason for i, reason in checked.unreadable.items()}
    if not bad:
        return notes, digests, {}
    reasons = {_short(sample, root): reason for sample, reason in bad.items()}
    named = enumerated([f"{name} ({reason})" for name, reason in reasons.items()])
    most = max(MAX_BAD, int(MAX_SHARE * len(samples)))
    count = len(checked.unreadable)
    if count > most or count > limit_bad * len(samples):
        raise PlanishError(
            f"{root}: {count} of {len(samples)} images cannot be read, more than the {limit_bad:.0%} "
            f"(at most {most}) that are skipped; repair or remove them: "
            f"{named}"
        )
    for listing in listings:
        for name, found in listing.files.items():
            listing.files[name] = [sample for sample in found if sample not in bad]
            if found and not listing.files[name]:
                raise PlanishError(f"{listing.root}: no image of the class {name!r} can be read: {named}")
    return [f"{count} of {len(samples)} images could not be read and were skipped: {named}", *notes], digests, reasons


def split_listing(listing: Listing, seed: int) -> tuple[Listing, Listing]:
    """A class-balanced random 80/20 split, a function of the seed and of the samples in each class.

    Raises:
        PlanishError: for a class with a single image.
    """
    generator = np.random.default_rng([seed & (2**63 - 1), 80])
    train, test = Listing(listing.root, {}), Listing(listing.root, {})
    for name, found in listing.files.items():
        if len(found) == 1:
            raise PlanishError(
                f"{listing.root}: the class {name!r} has one image; a split into training and test needs two or more"
            )
        order = generator.permutation(len(found))
        held = set(order[: max(1, round(TEST_FRACTION * len(found)))].tolist())
        train.files[name] = [sample for i, sample in enumerate(found) if i not in held]
        test.files[name] = [sample for i, sample in enumerate(found) if i in held]
    return train, test


def hash_of(listings: Sequence[Listing], digests: Mapping[Encoded, bytes]) -> str:
    """16 hex digits that depend on the bytes, the class and the order of every image."""
    digest = hashlib.blake2b(digest_size=8)
    for listing in listings:
        for name, samples in listing.files.items():
            digest.update(f"{name}|{len(samples)}|".encode("utf-8", "surrogateescape"))
            digest.update(b"".join(digests[sample] for sample in samples))
    return digest.hexdigest()


def note_overlap(root: Path, train: Listing, test: Listing, digests: Mapping[Encoded, bytes]) -> list[str]:
    """A note on test images whose encoded bytes are those of a training image; none where there are none."""
    known: dict[bytes, Encoded] = {}
    for sample in train:
        known.setdefault(digests[sample], sample)
    twins = [(sample, known[digests[sample]]) for sample in test if digests[sample] in known]
    if not twins:
        return []
    named = enumerated([f"{_short(a, root)} is {_short(b, root)}" for a, b in twins])
    return [
        f"{len(twins)} of {len(test)} test images are also training images, byte for byte, "
        f"so the measured accuracy is not that on new images: {named}"
    ]


def enumerated(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return "; ".join(names[:most]) + (f"; and {len(names) - most} more" if len(names) > most else "")


def _short(sample: Encoded, root: Path) -> str:
    """The name of a sample as seen from the folder that the user named, or from that of the file."""
    name = str(sample)
    for folder in (root, root.parent):
        if name.startswith(f"{folder}{os.sep}"):
            return name[len(f"{folder}{os.sep}") :]
    return name
