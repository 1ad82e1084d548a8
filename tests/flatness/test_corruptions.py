"""Corruptions against Pillow, scipy and matplotlib, and what holds for all of them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, stats

from planish.errors import PlanishError
from planish.flatness.corruptions import KINDS, STANDARD, STRENGTHS, corrupt, corrupted, disk_kernel
from planish.preprocessing import Preprocessing


def pictures(count: int = 6, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth shapes with edges and texture, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    phase = torch.rand(count, channels, 3, generator=generator)[..., None, None]
    waves = 0.5 + 0.25 * torch.sin(40 * x + 6 * phase[:, :, 0]) + 0.2 * torch.cos(25 * y * x + 6 * phase[:, :, 1])
    disk = ((x - phase[:, :1, 2]) ** 2 + (y - 0.5) ** 2 < 0.06).float()
    return (0.75 * waves + 0.25 * disk).clamp(0, 1)


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return -10 * math.log10((x - y).square().mean().item())


@pytest.mark.parametrize("side", [28, 32, 64, 96, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_stronger_is_further_from_the_image(kind, side):
    x = pictures(2, 3, side)
    found = [psnr(corrupt(x, kind, strength), x) for strength in range(1, 6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] - 1
    assert found[0] < 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (20, 45)), (3, (70, 66)), (1, (1, 3))])
def test_any_size_stays_an_image(kind, channels, size):
    x = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
    for strength in range(6):
        found = corrupt(x, kind, strength)
        assert found.shape == x.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
    assert torch.equal(corrupt(x, kind, 0), x)
    assert corrupt(x[:0], kind, 3).shape == (0, channels, *size)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_every_batch_and_run(kind):
    x = pictures()
    whole = corrupt(x, kind, 3, seed=7)
    parts = [corrupt(part, kind, 3, seed=7, start_index=i) for i, part in ((0, x[:1]), (1, x[1:5]), (5, x[5:]))]
    assert torch.equal(torch.cat(parts), whole)
    random = kind in ("noise", "shot", "impulse", "motion")
    assert torch.equal(corrupt(x, kind, 3, seed=8), whole) != random
    again = corrupt(x[:1].expand(2, -1, -1, -1), kind, 3)
    assert torch.equal(again[0], again[1]) != random


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_as_pixels(kind):
    codes = (pictures() * 255).round().byte()
    before = codes.clone()
    torch.testing.assert_close(corrupt(codes, kind, 2), corrupt(codes.float() / 255, kind, 2))
    assert torch.equal(codes, before)


@pytest.mark.parametrize(("side", "scale", "table"), [(28, 1, 0), (32, 1, 0), (64, 2, 0), (96, 96 / 224, 1)])
def test_blur_is_that_of_scipy(side, scale, table):
    x = pictures(1, 1, side)
    for strength in (1, 3, 5):
        sigma = STRENGTHS["blur"][table][strength - 1] * scale
        expected = ndimage.gaussian_filter(x[0, 0].double().numpy(), sigma, mode="nearest", truncate=4)
        np.testing.assert_allclose(corrupt(x, "blur", strength)[0, 0].numpy(), expected, atol=1e-5)


def test_defocus_is_a_smoothed_disk():
    x = pictures(1, 3, 112)  # half the size of the table
    y, z = np.mgrid[-6:7, -6:7]
    disk = (y**2 + z**2 <= 5.0**2).astype(float)
    one = np.exp(-0.5 * (np.arange(-1, 2) / 0.5) ** 2)
    kernel = ndimage.correlate(disk / disk.sum(), np.outer(one, one) / one.sum() ** 2, mode="constant")
    found = corrupt(x, "defocus", 5)
    for channel in range(3):
        expected = ndimage.correlate(x[0, channel].double().numpy(), kernel, mode="nearest")
        np.testing.assert_allclose(found[0, channel].numpy(), expected, atol=1e-5)
    assert disk_kernel(9.0, 0.5).shape == (23, 23)
    assert disk_kernel(9.0, 0.5).sum().item() == pytest.approx(1)


def test_motion_smears_a_point_along_one_line_to_one_side():
    x = torch.zeros(40, 1, 63, 63)
    x[..., 31, 31] = 1
    smeared = corrupt(x, "motion", 3)
    torch.testing.assert_close(smeared.sum((1, 2, 3)), torch.ones(40))
    assert not smeared[..., 32:].any()  # the trail leads to one side
    angles = []
    for image in smeared[:, 0]:
        rows, columns = (image > 0).nonzero().T - 31
        far = columns.abs().argmax()
        angles.append(math.atan2(rows[far], -columns[far]))
        assert (rows + columns * math.tan(angles[-1])).abs().max() <= 1.5
    assert max(angles) == pytest.approx(math.pi / 4, abs=0.15)
    assert min(angles) == pytest.approx(-math.pi / 4, abs=0.15)


def test_noise_has_its_published_laws():
    x = torch.full((40, 3, 32, 32), 0.5)
    gauss = corrupt(x, "noise", 5) - 0.5
    assert stats.kstest(gauss.flatten()[::7].numpy(), "norm", args=(0, 0.10)).pvalue > 1e-3
    photons = corrupt(x, "shot", 5) * 50
    torch.testing.assert_close(photons, photons.round(), rtol=0, atol=1e-4)
    assert photons.mean().item() == pytest.approx(25, rel=0.01)
    assert photons.var().item() == pytest.approx(25, rel=0.03)
    impulses = corrupt(x, "impulse", 5)
    for value in (0.0, 1.0):
        assert (impulses == value).float().mean().item() == pytest.approx(0.035, rel=0.08)
    assert ((impulses == 0.5) | (impulses == 0) | (impulses == 1)).all()


def test_noise_of_two_strengths_has_one_pattern():
    x = torch.full((2, 1, 32, 32), 0.5)
    weak, strong = (corrupt(x, "noise", strength) - 0.5 for strength in (1, 5))
    torch.testing.assert_close(weak / 0.04, strong / 0.10, rtol=0, atol=1e-4)


def test_contrast_and_brightness_are_those_of_the_paper():
    x = pictures()
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 5), (mean + 0.15 * (x - mean)).clamp(0, 1))
    x[0, :, 0, 0] = 0  # black has no hue
    hsv = rgb_to_hsv(x.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    found = corrupt(x, "brightness", 5).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, hsv_to_rgb(hsv), atol=1e-5)
    grey = pictures(2, 1)
    torch.testing.assert_close(corrupt(grey, "brightness", 2), (grey + 0.1).clamp(max=1))


@pytest.mark.parametrize(("channels", "side", "quality"), [(1, 28, 40), (3, 32, 40), (3, 80, 7)])
def test_jpeg_is_that_of_pillow(channels, side, quality):
    codes = (pictures(2, channels, side) * 255).round().byte()
    found = (corrupt(codes, "jpeg", 5) * 255).round().byte()
    for image, got in zip(codes, found, strict=True):
        file = io.BytesIO()
        array = image.permute(1, 2, 0).numpy().squeeze()
        Image.fromarray(array, "L" if channels == 1 else "RGB").save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).reshape(side, side, channels)
        np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_pixelate_makes_blocks_of_their_mean():
    codes = (pictures(1, 3, 128) * 255).round().byte()  # 0.25 of 128: blocks of 4 x 4
    found = corrupt(codes, "pixelate", 5)
    blocks = found.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert torch.equal(blocks.amax(-1), blocks.amin(-1))
    expected = torch.nn.functional.avg_pool2d(codes.float() / 255, 4)
    torch.testing.assert_close(blocks[..., 0], expected, rtol=0, atol=1.01 / 255)


def test_normalized_inputs_are_corrupted_as_pixels():
    preprocessing = Preprocessing((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    codes = (pictures() * 255).round().byte()
    inputs = (codes / 255 - mean) / std
    for kind in KINDS:
        found = corrupted(inputs, preprocessing, kind, 4, seed=3, start_index=11) * std + mean
        torch.testing.assert_close(found, corrupt(codes, kind, 4, seed=3, start_index=11), rtol=0, atol=1e-5)
    assert corrupted(inputs, preprocessing, "noise", 0) is inputs
    assert corrupted(inputs.half(), preprocessing, "blur", 1).dtype == torch.float16


def test_every_kind_has_two_tables_of_five():
    assert set(STANDARD) == {"noise", "blur", "contrast", "jpeg"}
    assert set(STANDARD) <= set(KINDS)
    assert all(len(table) == 5 for pair in STRENGTHS.values() for table in pair)


def test_errors():
    x, grey = pictures(1), Preprocessing((1, 32, 32), (0.5,), (0.5,))
    with pytest.raises(PlanishError, match="'fog' is not known: choose from noise"):
        corrupt(x, "fog", 1)
    for strength in (6, -1, 1.5):
        with pytest.raises(PlanishError, match="choose 1 to 5"):
            corrupt(x, "noise", strength)  # type: ignore[arg-type]
    for shape in ((3, 8, 8), (1, 2, 8, 8)):
        with pytest.raises(PlanishError, match="1 or 3"):
            corrupt(torch.zeros(shape), "noise", 1)
    with pytest.raises(PlanishError, match=r"\(images, 1, height, width\)"):
        corrupted(x, grey, "noise", 1)
    with pytest.raises(PlanishError, match="not known"):
        corrupted(x[:, :1], grey, "fog", 0)
