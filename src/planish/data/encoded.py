"""Encoded images as a data set: decoded, transformed and augmented when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from planish.data.decode import Encoded, read_image
from planish.data.randomness import draw
from planish.errors import PlanishError
from planish.images import reversed_channels
from planish.models.preprocessing import Preprocessing


class EncodedImages(Dataset[tuple[Tensor, int]]):
    """Encoded images, decoded when they are asked for and transformed as timm's evaluation transform does.

    With ``augment``, a random crop of 60 to 100 % of the area is resized instead, and half of the images are mirrored;
    what happens to a sample depends on (seed, epoch, index) alone. ``dataset[i]`` is (float32 (C, H, W), label).

    Args:
        samples: files, members of tar files or rows of a data set (:class:`planish.data.decode.Encoded`).
        labels: one for each.
    """

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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are given out."""
        self.epoch = epoch

    def augmented(self, on: bool = True) -> EncodedImages:
        """The same images with or without augmentation."""
        other = copy.copy(self)
        other.augment = on
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.samples[index]
        try:
            image = read_image(sample, self.preprocessing.input_size[0])
        except Exception as error:
            raise PlanishError(f"{sample} could be read when the data were loaded and cannot now: {error}") from error
        if self.preprocessing.channel_order == "bgr":
            image = reversed_channels(image)
        if not self.augment:
            return self._plain(image), self.labels[index]
        key = int(draw(self.seed, self.epoch, np.array([index % len(self)]), 1)[0, 0] >> np.uint64(1))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(key)
            return self._random(image), self.labels[index]
