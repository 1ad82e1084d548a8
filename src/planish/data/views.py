"""Another view of the images in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.errors import PlanishError


def random_view(images: Tensor, shift: float = 0.125, flip: float = 0.5) -> Tensor:
    """Each image of (N, C, H, W) shifted by up to a share of its side, and mirrored with probability ``flip``.

    What moves in is the image's own reflection. Draws from torch's global generator.

    Raises:
        PlanishError: ``images`` is no batch of images, or a share lies outside [0, 1].
    """
    if images.dim() != 4:
        raise PlanishError(f"a second view is made of images (N, C, H, W), got a tensor of shape {tuple(images.shape)}")
    if not (0 <= shift <= 1 and 0 <= flip <= 1):
        raise PlanishError(f"shift is {shift} and flip is {flip} of a random view: both lie in [0, 1]")
    n, channels, height, width = images.shape
    rows, columns = (_shifted(n, side, shift) for side in (height, width))
    mirrored = torch.rand(n, 1) < flip
    columns = torch.where(mirrored, width - 1 - columns, columns)
    batch, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    index = (batch, channel, rows[:, None, :, None], columns[:, None, None, :])
    return images[tuple(part.to(images.device) for part in index)]


def _shifted(n: int, side: int, share: float) -> Tensor:
    """For each of n images: where each of ``side`` lines comes from, reflected at both ends; (n, side)."""
    reach = min(round(share * side), side - 1)
    lines = (torch.arange(side) + torch.randint(-reach, reach + 1, (n, 1))).abs()
    return (side - 1) - ((side - 1) - lines).abs()


def distort(images: Tensor, strength: float) -> Tensor:
    """Each image of (N, C, H, W) with another contrast and brightness, noise, and a square cut out.

    At full ``strength`` the contrast changes by up to half, the brightness by up to half the image's own standard
    deviation, the noise has a fifth of it, and the square has half the side of the image; at 0 nothing changes. The
    square holds the image's mean. Draws from torch's global generators.

    Raises:
        PlanishError: ``images`` is no batch of images in float, or ``strength`` lies outside [0, 1].
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise PlanishError(
            f"distortion takes images (N, C, H, W) in float, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if not 0 <= strength <= 1:
        raise PlanishError(f"the strength of a distortion is {strength}: it lies in [0, 1]")
    if strength == 0:
        return images
    n, _, height, width = images.shape
    mean = images.mean((1, 2, 3), keepdim=True)
    centred = images - mean
    deviation = centred.square().mean((1, 2, 3), keepdim=True).sqrt()
    contrast, brightness = (strength * (torch.rand(2, n, 1, 1, 1) - 0.5)).to(images)
    noise = 0.2 * strength * torch.randn_like(images)
    cut = _within(n, height, strength / 2)[:, None, :, None] & _within(n, width, strength / 2)[:, None, None, :]
    changed = mean + centred * (1 + contrast) + deviation * (brightness + noise)
    return torch.where(cut.to(images.device), mean, changed)


def _within(n: int, side: int, share: float) -> Tensor:
    """For each of n images: which of ``side`` lines a span of that share covers, wherever it lies; (n, side)."""
    span = round(share * side)
    first = torch.randint(0, side - span + 1, (n, 1))
    lines = torch.arange(side)
    return (lines >= first) & (lines < first + span)
