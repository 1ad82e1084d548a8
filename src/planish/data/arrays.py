"""Images that are small enough to stay in memory, given out a whole batch at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from planish.data.randomness import draw
from planish.models.preprocessing import Preprocessing


class StackedBatch(list):
    """The samples of one batch, which also carries them already stacked: ``images`` (N, C, H, W), ``labels`` (N,).

    A list of (image, label) like any other for a loader that knows nothing of it.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(zip(images.unbind(0), labels.tolist(), strict=True))
        self.images, self.labels = images, labels


class BatchedTensorDataset(Dataset[tuple[Tensor, int]]):
    """uint8 images in memory, normalized and (optionally) augmented a batch at a time.

    Args:
        images: uint8, shape (N, H, W) or (N, C, H, W) with 1 or 3 channels.
        labels: shape (N,).
        preprocessing: the model's; images of another size are resized, grey and RGB converted.
        augment: shift each image by up to ``max_shift`` pixels (zeros move in) and mirror half of them. What happens
            to a sample depends on (seed, epoch, index) alone.

    ``dataset[i]`` is (float32 image (C, H, W), label); ``__getitems__`` gives a :class:`StackedBatch`.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | Sequence[int],
        preprocessing: Preprocessing,
        *,
        augment: bool = False,
        seed: int = 0,
        max_shift: int = 2,
    ) -> None:
        pixels = torch.as_tensor(images)
        self.images = pixels[:, None] if pixels.dim() == 3 else pixels
        self.targets = torch.as_tensor(labels).long()
        self.labels: list[int] = self.targets.tolist()
        self.preprocessing, self.augment, self.seed, self.max_shift, self.epoch = (
            preprocessing,
            augment,
            seed,
            max_shift,
            0,
        )
        self._mean = torch.tensor(preprocessing.mean)[:, None, None]
        self._std = torch.tensor(preprocessing.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentations are given out."""
        self.epoch = epoch

    def augmented(self, on: bool = True) -> BatchedTensorDataset:
        """The same images with or without augmentation (memory is shared, the epoch is not)."""
        other = copy.copy(self)
        other.augment = on
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._batch([index])[0][0], self.labels[index]

    def __getitems__(self, indices: list[int]) -> StackedBatch:
        return StackedBatch(*self._batch(indices))

    def _batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.augment:
            images = shift_and_flip(images, draw(self.seed, self.epoch, index.numpy(), 3), self.max_shift)
        images = with_channels(fit_size(images, self.preprocessing), self.preprocessing.input_size[0])
        if self.preprocessing.channel_order == "bgr":
            images = images.flip(1)
        return images.float().div_(255).sub_(self._mean).div_(self._std), self.targets[index]


def shift_and_flip(images: Tensor, numbers: np.ndarray, max_shift: int) -> Tensor:
    """Shift and mirror each image of (N, C, H, W) as its three numbers, uint64 (N, 3), say."""
    n, _, height, width = images.shape
    reach = np.uint64(2 * max_shift + 1)
    dy, dx = (torch.from_numpy((numbers[:, k] % reach).astype(np.int64))[:, None] for k in (0, 1))
    mirrored = torch.from_numpy(numbers[:, 2] >> np.uint64(63) == 1)[:, None]
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + dx
    rows = torch.arange(height).expand(n, height) + dy
    padded = F.pad(images, (max_shift,) * 4)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return picked.permute(0, 3, 1, 2)


def fit_size(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize uint8 (N, C, H, W) to the model's ``size / crop_pct`` and crop the centre, as timm does with files.

    Interpolations that tensors do not offer (Lanczos, random) are replaced by bicubic.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    target = preprocessing.input_size[1:]
    height, width = images.shape[-2:]
    least = [math.floor(side / preprocessing.crop_pct) for side in target]
    factors = (least[0] / height, least[1] / width)
    if preprocessing.crop_mode == "squash":
        wanted = least
    elif preprocessing.crop_mode == "border":
        wanted = [round(side * min(factors)) for side in (height, width)]
    else:
        wanted = [round(side * max(factors)) for side in (height, width)]
    if wanted != [height, width]:
        modes: dict[str, Any] = {"bilinear": InterpolationMode.BILINEAR, "nearest": InterpolationMode.NEAREST}
        mode = modes.get(preprocessing.interpolation, InterpolationMode.BICUBIC)
        images = tv.resize(images, wanted, interpolation=mode, antialias=True)
    return images if images.shape[-2:] == target else tv.center_crop(images, list(target))


def with_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 (N, 1 or 3, H, W) with the number of channels asked for: grey is repeated, RGB becomes its luma."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    luma = torch.tensor([19595, 38470, 7471])[:, None, None]  # ITU-R 601 in 1/65536, the weights that Pillow uses
    return ((images.int() * luma).sum(1, keepdim=True) + 32768).bitwise_right_shift(16).to(torch.uint8)
