"""CutMix on images without labels: more calibration images out of the same."""

from __future__ import annotations

import torch
from torch import Tensor


def cutmix(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a rectangle of another one (Yun et al. 2019, arXiv 1905.04899, section 3.1).

    The share of the image that stays is drawn evenly from [0, 1], the centre of the rectangle evenly over the image,
    both anew for each image. A tensor that is no batch of images comes back as it is.

    Args:
        images: (N, channels, height, width).
    """
    if images.dim() != 4 or not images.is_floating_point():
        return images
    count, _, height, width = images.shape
    others = torch.randperm(count, generator=generator)
    cut = (1 - torch.rand(count, generator=generator)).sqrt()
    inside = torch.ones(count, height, width, dtype=torch.bool)
    for size, axis in ((height, 1), (width, 2)):
        centre = torch.rand(count, generator=generator) * size
        low, high = centre - cut * size / 2, centre + cut * size / 2
        place = torch.arange(size) + 0.5
        within = (place >= low[:, None]) & (place < high[:, None])
        inside &= within[:, :, None] if axis == 1 else within[:, None, :]
    return torch.where(inside[:, None].to(images.device), images[others.to(images.device)], images)
