"""Encoded images as a data set: decoded, transformed and augmented when they are asked for."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from planish.data.decode import Encoded, read_image, reason_of
from planish.data.randomness import draw
from planish.errors import PlanishError
from planish.images import reversed_channels
from planish.models.preprocessing import Preprocessing

MAX_REPLACED = 100
"""Training images that may become unreadable while they are in use (1 % where that is more, and 5 % of few)."""
_PAUSE = 1.0  # seconds before a second attempt: a file system in the network may be away for a moment


class EncodedImages(Dataset[tuple[Tensor, int]]):
    """Encoded images, decoded when they are asked for and transformed as timm's evaluation transform does.

    With ``augment``, a random crop of 60 to 100 % of the area is resized instead, and half of the images are mirrored;
    what happens to a sample depends on (seed, epoch, index) alone. ``dataset[i]`` is (float32 (C, H, W), label).

    An image that can no longer be read is an error that names it. With ``augment``, which is for training, the next
    readable image of its class takes its place, a warning names it, and :attr:`replaced` lists it.

    Args:
        samples: files, members of tar files or rows of a data set (:class:`planish.data.decode.Encoded`).
        labels: one for each.
    """

    content = ""  # a hash of all images, where whoever made the data set computed one

    def __init__(
        self,
        samples: Sequence[Encoded],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        from timm.data import create_transform
        from timm.data.transforms import str_to_interp_mode
        from torchvision import transforms as tv

        self.samples, self.labels = list(samples), [int(label) for label in labels]
        self.preprocessing, self.augment, self.seed, self.epoch = preprocessing, augment, seed, 0
        self._lost = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()  # one for all worker processes
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
        return len(self.samples)

    @property
    def replaced(self) -> list[str]:
        """The images that could no longer be read and were replaced, in this process and in those of its loaders."""
        return [str(self.samples[i]) for i in self._lost.nonzero().flatten().tolist()]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are given out."""
        self.epoch = epoch

    def augmented(self, on: bool = True) -> EncodedImages:
        """The same images with or without augmentation."""
        other = copy.copy(self)
        other.augment = on
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index = range(len(self))[index]
        image = self._or_another(index) if self.augment else self._read(index)
        if self.preprocessing.channel_order == "bgr":
            image = reversed_channels(image)
        if not self.augment:
            return self._plain(image), self.labels[index]
        key = int(draw(self.seed, self.epoch, np.array([index]), 1)[0, 0] >> np.uint64(1))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(key)
            return self._random(image), self.labels[index]

    def _read(self, index: int) -> Image.Image:
        """The image, at the second attempt if the file system refuses the first."""
        sample = self.samples[index]
        try:
            try:
                return read_image(sample, self.preprocessing)
            except OSError as error:
                if error.errno is None:  # Pillow's: the bytes are there and are no image
                    raise
                time.sleep(_PAUSE)
                return read_image(sample, self.preprocessing)
        except Exception as error:
            raise PlanishError(
                f"{sample} could be read when the data were loaded and cannot now ({reason_of(error)}): put it back"
            ) from error

    def _or_another(self, index: int) -> Image.Image:
        """The image, or the next one of its class that can be read."""
        for other in self._circle(index):
            if self._lost[other]:
                continue
            try:
                return self._read(other)
            except PlanishError as error:
                self._lost[other] = True
                lost = int(self._lost.sum())
                if lost > min(max(MAX_REPLACED, len(self) // 100), max(1, len(self) // 20)):
                    raise PlanishError(
                        f"{lost} of {len(self)} training images can no longer be read: {error}"
                    ) from error
                warnings.warn(f"{error}; another image of its class takes its place", stacklevel=3)
        raise PlanishError(f"no image of the class of {self.samples[index]} can be read any more: put them back")

    def _circle(self, index: int) -> Iterator[int]:
        """This image and then the others of its class, in the order of the list."""
        total = len(self)
        return (i % total for i in range(index, index + total) if self.labels[i % total] == self.labels[index])
