"""Corruptions of images at five strengths (Hendrycks and Dietterich 2019, arXiv 1903.12261), restated on tensors.

The strengths are those of the paper's two published data sets: images of up to 64 pixels a side get those of CIFAR-10-C
(32 pixels), larger ones those of ImageNet-C (224 pixels). Lengths (of blurs) are given for that size and grow with the
shorter side; the small ones do not shrink below 32 pixels, where they are parts of a pixel already. Other than in the
data sets, the corrupted image is neither rounded to 8 bits nor stored as a JPEG afterwards.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from planish.data.randomness import generator_for
from planish.errors import PlanishError
from planish.preprocessing import Preprocessing

SMALL = 64  # largest side of images that are corrupted as CIFAR-10-C is
STRENGTHS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    # Gaussian noise: standard deviation, for pixels in [0, 1]
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    # shot noise: photons at white
    "shot": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    # impulse noise: share of values that become 0 or 1
    "impulse": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    # Gaussian blur: standard deviation in pixels
    "blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    # defocus blur: radius of the disk in pixels, and standard deviation of the Gaussian that smooths its rim
    "defocus": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    # motion blur: radius (half the length of the trail) and standard deviation along it, in pixels
    "motion": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    # share of the contrast that is left
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # added to the value of HSV
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # resolution that is left, as a share of each side
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    # JPEG: quality in Pillow's sense
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
KINDS = tuple(STRENGTHS)
STANDARD = ("noise", "blur", "contrast", "jpeg")


def corrupted(
    inputs: Tensor, preprocessing: Preprocessing, kind: str, strength: int, seed: int = 0, start_index: int = 0
) -> Tensor:
    """Normalized inputs (N, C, H, W) of a model as they would be had the image been corrupted before normalization.

    Arguments and errors are those of :func:`corrupt`; strength 0 gives the inputs back. Pixels are brought back to the
    8-bit codes that they come from, so that rounding errors of the normalization change nothing. The device stays.

    Raises:
        PlanishError: the inputs have another number of channels than the preprocessing.
    """
    if inputs.dim() != 4 or inputs.shape[1] != len(preprocessing.mean):
        raise PlanishError(
            f"inputs of shape {tuple(inputs.shape)} cannot be corrupted: expected (images, "
            f"{len(preprocessing.mean)}, height, width), as the preprocessing says"
        )
    if strength == 0 and kind in STRENGTHS:
        return inputs
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    codes = ((inputs.detach().cpu().float() * std + mean).clamp(0, 1) * 255).round().byte()
    return ((corrupt(codes, kind, strength, seed, start_index) - mean) / std).to(inputs)


def corrupt(images: Tensor, kind: str, strength: int, seed: int = 0, start_index: int = 0) -> Tensor:
    """Corrupt pixels.

    What happens to an image depends on (seed, its index) alone, not on the batch it is in.

    Args:
        images: (N, C, H, W) with 1 or 3 channels, floating point in [0, 1], or uint8.
        kind: one of ``KINDS``.
        strength: 1 to 5; 0 changes nothing.
        start_index: index of the first image; the others follow.

    Returns:
        float32 in [0, 1], on the CPU.

    Raises:
        PlanishError: an unknown kind or strength, or another shape.
    """
    if kind not in STRENGTHS:
        raise PlanishError(f"corruption {kind!r} is not known: choose from {', '.join(KINDS)}")
    if strength not in range(6):
        raise PlanishError(f"strength {strength!r} of {kind} is not known: choose 1 to 5, or 0 for clean images")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise PlanishError(f"images of shape {tuple(images.shape)} cannot be corrupted: expected (N, 1 or 3, H, W)")
    images = images.cpu().float() / (1 if images.is_floating_point() else 255)
    if strength == 0 or not len(images):
        return images
    side = min(images.shape[-2:])
    table, scale = (0, max(1.0, side / 32)) if max(images.shape[-2:]) <= SMALL else (1, side / 224)
    generators = [generator_for(seed, 0, start_index + i) for i in range(len(images))]
    found = _FUNCTIONS[kind](images, STRENGTHS[kind][table][strength - 1], scale, generators)
    return found.clamp_(0, 1)


Generators = list[torch.Generator]  # one an image


def _noise(x: Tensor, deviation: float, scale: float, generators: Generators) -> Tensor:
    return x + deviation * torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])


def _shot(x: Tensor, photons: float, scale: float, generators: Generators) -> Tensor:
    pairs = zip(x, generators, strict=True)
    return torch.stack([torch.poisson(image * photons, generator=g) for image, g in pairs]) / photons


def _impulse(x: Tensor, share: float, scale: float, generators: Generators) -> Tensor:
    chance = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators])
    pepper, salt = chance < share / 2, chance > 1 - share / 2
    return x.masked_fill(pepper, 0.0).masked_fill(salt, 1.0)


def _blur(x: Tensor, deviation: float, scale: float, generators: Generators) -> Tensor:
    kernel = gaussian_kernel(deviation * scale, math.floor(4 * deviation * scale + 0.5))
    return filtered(filtered(x, kernel[:, None]), kernel[None, :])


def _defocus(x: Tensor, lens: tuple[float, float], scale: float, generators: Generators) -> Tensor:
    return filtered(x, disk_kernel(lens[0] * scale, lens[1]))


def _motion(x: Tensor, trail: tuple[float, float], scale: float, generators: Generators) -> Tensor:
    """A one-sided Gaussian trail at -45 to 45 degrees from the horizontal, each of its points on the nearest pixel."""
    length = 2 * math.ceil(trail[0] * scale) + 1
    half = gaussian_kernel(trail[1] * scale, length - 1)[length - 1 :]
    weights = (half / half.sum()).tolist()
    height, width = x.shape[-2:]
    padded = F.pad(x, (length,) * 4, mode="replicate")
    found = torch.zeros_like(x)
    for image, source, generator in zip(found, padded, generators, strict=True):
        angle = (torch.rand((), generator=generator).item() - 0.5) * math.pi / 2
        for i, weight in enumerate(weights):
            top, left = length + round(i * math.sin(angle)), length + round(i * math.cos(angle))
            image += weight * source[:, top : top + height, left : left + width]
    return found


def _contrast(x: Tensor, left: float, scale: float, generators: Generators) -> Tensor:
    mean = x.mean((-2, -1), keepdim=True)
    return (x - mean) * left + mean


def _brightness(x: Tensor, added: float, scale: float, generators: Generators) -> Tensor:
    """The largest channel (the value of HSV) grows; hue and saturation stay, so all channels grow in proportion."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value.clamp(min=torch.finfo(x.dtype).tiny)), brighter)


def _pixelate(x: Tensor, share: float, scale: float, generators: Generators) -> Tensor:
    def small_and_back(image: Image.Image) -> Image.Image:
        size = [max(1, int(side * share)) for side in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return through_pillow(x, small_and_back)


def _jpeg(x: Tensor, quality: int, scale: float, generators: Generators) -> Tensor:
    def stored(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return through_pillow(x, stored)


def gaussian_kernel(deviation: float, radius: int) -> Tensor:
    """Sampled Gaussian of 2 ``radius`` + 1 values with sum 1."""
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1.0, dtype=torch.float64) / deviation) ** 2)
    return (kernel / kernel.sum()).float()


def disk_kernel(radius: float, rim: float) -> Tensor:
    """The pixels within ``radius`` of the centre, smoothed by a Gaussian of ``rim`` pixels (3 x 3; 5 x 5 above 8)."""
    half = math.floor(radius)
    place = torch.arange(-half, half + 1.0)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).float()
    smooth = gaussian_kernel(rim, 1 if radius <= 8 else 2)
    pad = len(smooth) - 1
    return F.conv2d((disk / disk.sum())[None, None], smooth.outer(smooth)[None, None], padding=pad)[0, 0]


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of (N, C, H, W) correlated with an odd-sized kernel (h, w); pixels at the edge are repeated."""
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    channels = x.shape[1]
    padded = F.pad(x, (wide, wide, high, high), mode="replicate")
    return F.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def through_pillow(x: Tensor, function: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Each image of (N, 1 or 3, H, W) in 8 bits through a function of Pillow images of mode L or RGB."""
    codes = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    found = [np.asarray(function(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image))) for image in codes]
    return torch.from_numpy(np.stack(found).reshape(codes.shape)).permute(0, 3, 1, 2).float() / 255


_FUNCTIONS: dict[str, Callable[[Tensor, Any, float, Generators], Tensor]] = {
    "noise": _noise, "shot": _shot, "impulse": _impulse, "blur": _blur, "defocus": _defocus, "motion": _motion,
    "contrast": _contrast, "brightness": _brightness, "pixelate": _pixelate, "jpeg": _jpeg,
}  # fmt: skip
