"""The images of a diagnosis: on which ranges are set, what is looked at, where networks are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from planish.data import calibration_subset, make_loader
from planish.recipes.config import ModelOptions
from planish.recipes.effort import MOST, Effort
from planish.recipes.material import Material

SMALL_BATCH = 64  # images at a time in a network that gets fewer than the most images


@dataclass(frozen=True)
class LookedAt:
    """Loaders, each with the same images in the same order every time."""

    calibration: DataLoader[Any]
    images: DataLoader[Any]  # labelled training images
    test: DataLoader[Any]
    corrupted: DataLoader[Any]  # some of the test images
    test_images: int

    @classmethod
    def choose(cls, material: Material, effort: Effort, options: ModelOptions) -> LookedAt:
        """Training images balanced over the classes, test images at random; all by the seed."""
        data, whole = material.data, len(material.data.train_labels)
        size = options.batch_size if effort.images >= MOST else min(options.batch_size, SMALL_BATCH)

        def training(count: int) -> DataLoader[Any]:
            subset = calibration_subset(data.train, data.train_labels, min(count, whole), options.seed)
            return make_loader(subset, size, shuffle=False, seed=0, workers=options.workers)

        order = torch.randperm(material.test_images, generator=torch.Generator().manual_seed(options.seed)).tolist()

        def testing(count: int) -> DataLoader[Any]:
            chosen = Subset(data.test, sorted(order[:count]))
            return make_loader(chosen, options.batch_size, shuffle=False, seed=0, workers=options.workers)

        count = min(effort.test_images, material.test_images)
        return cls(
            training(effort.calibration_images), training(effort.images), testing(count),
            testing(min(count, effort.corrupted_images)), count,
        )  # fmt: skip
