"""Batches in an order that depends on (seed, epoch) alone, and balanced subsets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate

from planish.data.arrays import StackedBatch
from planish.data.randomness import generator_for
from planish.errors import PlanishError


def collate(batch: list[Any]) -> Any:
    """(images (N, C, H, W), labels (N,)) from a batch's samples; a batch that is already stacked is passed on."""
    return (batch.images, batch.labels) if isinstance(batch, StackedBatch) else default_collate(batch)


def augmented(dataset: Dataset[Any], on: bool) -> Dataset[Any]:
    """The same data set with or without augmentation, also inside a ``Subset``; others are given back unchanged."""
    if isinstance(dataset, Subset):
        return Subset(augmented(dataset.dataset, on), dataset.indices)
    return dataset.augmented(on) if hasattr(dataset, "augmented") else dataset


class EpochView(Dataset[Any]):
    """A data set of one loader's own: its epoch is what the loader's order and its augmentations depend on.

    Two loaders over the same images do not share an epoch. Accelerate looks for ``set_epoch`` on the sampler in some
    set-ups and on the data set in others; here both reach this one number.
    """

    def __init__(self, dataset: Dataset[Any], augment: bool | None) -> None:
        base: Any = dataset
        while isinstance(base, Subset):
            base = base.dataset
        keep = getattr(base, "augment", False) if augment is None else augment
        self.dataset: Any = augmented(dataset, keep)  # a shallow copy of planish's own data sets
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        base = self.dataset
        while isinstance(base, Subset):
            base = base.dataset
        if hasattr(base, "set_epoch"):
            base.set_epoch(epoch)

    @property
    def replaced(self) -> list[str]:
        """The images that could no longer be read and were replaced."""
        base = self.dataset
        while isinstance(base, Subset):
            base = base.dataset
        return getattr(base, "replaced", [])

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if callable(getattr(self.dataset, "__getitems__", None)):
            return self.dataset.__getitems__(indices)
        return [self.dataset[i] for i in indices]


class EpochSampler(Sampler[int]):
    """A permutation of the data set for each (seed, epoch)."""

    def __init__(self, view: EpochView, seed: int) -> None:
        self.view, self.seed = view, seed

    def __len__(self) -> int:
        return len(self.view)

    def set_epoch(self, epoch: int) -> None:
        self.view.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(len(self), generator=generator_for(self.seed, self.view.epoch, 0)).tolist()


def make_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    drop_last: bool = False,
    augment: bool | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of (images (N, C, H, W), labels (N,)) whose order is a function of (seed, epoch).

    The epoch is 0 until :func:`set_epoch`; a loader prepared by Accelerate counts epochs by itself. Neither order nor
    augmentation depends on ``workers``, on the global random state or on what was drawn before, so that an interrupted
    epoch can be continued with ``accelerate.skip_first_batches``.

    Args:
        augment: ``True`` or ``False`` decides for this loader; ``None`` leaves it to the data set.

    Raises:
        PlanishError: for an empty data set, a batch size below 1, or a ``drop_last`` that leaves no batch.
    """
    view = EpochView(dataset, augment)
    if len(view) == 0:
        raise PlanishError("the data set holds no images: a loader needs at least one")
    if batch_size < 1 or workers < 0:
        raise PlanishError(f"batch_size must be 1 or more and workers 0 or more, got {batch_size} and {workers}")
    if drop_last and len(view) < batch_size:
        raise PlanishError(f"{len(view)} images do not fill one batch of {batch_size}: choose a smaller batch size")
    return DataLoader(
        view,
        batch_size,
        sampler=EpochSampler(view, seed) if shuffle else None,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Starting an iteration draws one number; from here, so that it does not come from the global generator.
        generator=torch.Generator().manual_seed(seed & (2**63 - 1)),
    )


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Choose the epoch whose order and augmentations the next iteration gives (plain loaders and prepared ones)."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch)
    elif hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def calibration_subset(dataset: Dataset[Any], labels: Sequence[int], n: int, seed: int = 0) -> Subset[Any]:
    """``n`` images without augmentation, as equal in number per class as the classes allow, in random order.

    Every class gives its share; what a small class cannot give is spread over the others.

    Args:
        labels: one per image of ``dataset``.

    Raises:
        PlanishError: when ``n`` is below 1 or above the number of images.
    """
    total = len(labels)
    if len(dataset) != total:  # type: ignore[arg-type]
        raise PlanishError(f"calibration: {total} labels for {len(dataset)} images")  # type: ignore[arg-type]
    if not 1 <= n <= total:
        raise PlanishError(f"calibration: {n} images asked for, the training split has {total}: choose 1 to {total}")
    generator = np.random.default_rng([seed & (2**63 - 1), n])
    classes = np.asarray(labels)
    queues = [generator.permutation(np.flatnonzero(classes == c)) for c in np.unique(classes)]
    # Deal the images out in rounds, one of each class; within a round the classes come in random order.
    rounds = np.concatenate([np.arange(len(queue)) for queue in queues])
    ties = generator.random(total)
    order = np.lexsort((ties, rounds))[:n]
    picked = generator.permutation(np.concatenate(queues)[order])
    return Subset(augmented(dataset, False), picked.tolist())
