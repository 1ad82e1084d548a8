"""Images without labels: every image file below a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from planish.data.encoded import EncodedImages
from planish.data.listing import Listing, drop_unreadable, hash_of
from planish.errors import PlanishError
from planish.images import list_images
from planish.models.preprocessing import Preprocessing


def load_unlabelled(
    root: Path,
    preprocessing: Preprocessing,
    *,
    seed: int = 0,
    limit_bad: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[EncodedImages, list[str]]:
    """The images below ``root``, in folders inside it too, each with the label -1; and notes on what was skipped.
    Their ``content`` is a hash of them all.

    Raises:
        PlanishError: the folder is missing or holds no image, or too many of its images cannot be read.
    """
    root = root.expanduser()
    if not root.is_dir():
        raise PlanishError(f"the folder of unlabelled images {root} does not exist: give a folder with image files")
    found, other = list_images(root)
    if not found:
        raise PlanishError(f"{root} holds no image file ({other} other files): give a folder with image files")
    listing = Listing(root, {"": found}, other)
    notes, digests, _ = drop_unreadable([listing], preprocessing, root=root, limit_bad=limit_bad, progress=progress)
    paths = listing.files[""]
    images = EncodedImages(paths, [-1] * len(paths), preprocessing, seed=seed)
    images.content = hash_of([listing], digests)
    return images, notes
