"""What the classifier sees is, to the bit, what evaluation with class folders sees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from planish.data.arrays import BatchedTensorDataset
from planish.data.encoded import EncodedImages
from planish.deploy.pixels import INTERPOLATIONS, to_input
from planish.errors import PlanishError
from planish.images import decode
from planish.preprocessing import Preprocessing

IMAGENET = Preprocessing((3, 224, 224), crop_pct=0.9)
GREY = Preprocessing((1, 28, 28), (0.2860,), (0.3530,), crop_pct=1.0)
SMALL = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.8)


def noise(height, width, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def agree(path, preprocessing):
    expected = EncodedImages([path], [0], preprocessing)[0][0].numpy()
    got = to_input(decode(path, preprocessing.input_size[0]), preprocessing)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert np.array_equal(got, expected), np.abs(got - expected).max()


def changed(preprocessing, **changes):
    return dataclasses.replace(preprocessing, **changes)


def test_grey_images_of_the_networks_own_size(tmp_path):
    image = noise(28, 28, 1)
    image.save(tmp_path / "a.png")
    agree(tmp_path / "a.png", GREY)
    embedded = BatchedTensorDataset(np.array(image)[None], [0], GREY)[0][0].numpy()
    assert np.array_equal(to_input(image, GREY), embedded)


@pytest.mark.parametrize("size", [(300, 400), (401, 299), (224, 224), (249, 248), (37, 500), (1, 1), (248, 600)])
def test_bicubic_at_224(tmp_path, size):
    noise(*size).save(tmp_path / "a.png")
    agree(tmp_path / "a.png", IMAGENET)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", sorted(INTERPOLATIONS))
def test_every_crop_mode_and_interpolation(tmp_path, mode, interpolation):
    for i, (height, width) in enumerate([(45, 61), (64, 33), (16, 90), (32, 32)]):
        noise(height, width).save(tmp_path / f"{i}.png")
        for crop in (0.8, 1.0):
            agree(tmp_path / f"{i}.png", changed(SMALL, crop_mode=mode, interpolation=interpolation, crop_pct=crop))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_models_that_are_not_square(tmp_path, mode):
    noise(50, 71).save(tmp_path / "a.png")
    for size in ((3, 24, 40), (3, 40, 24), (3, 33, 32)):
        agree(tmp_path / "a.png", changed(SMALL, input_size=size, crop_mode=mode, crop_pct=0.875))
    agree(tmp_path / "a.png", changed(GREY, input_size=(1, 24, 40), crop_mode=mode, crop_pct=0.875))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(8, 40), st.integers(8, 40), st.floats(0.5, 1.0),
    st.sampled_from(["center", "squash", "border"]),
)  # fmt: skip
def test_any_shape(tmp_path, height, width, rows, columns, crop, mode):
    if mode == "border":  # a hair would have no pixel left: timm fails
        assume(max(height / rows, width / columns) < min(height, width))
    noise(height, width, 1).save(tmp_path / "a.bmp")
    agree(tmp_path / "a.bmp", changed(GREY, input_size=(1, rows, columns), crop_pct=crop, crop_mode=mode))


def test_files_of_every_mode(tmp_path):
    rgb, grey = noise(40, 60), noise(40, 60, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.quantize(16).save(tmp_path / "palette.png")
    rgb.quantize(16).save(tmp_path / "palette.gif")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("RGBA").save(tmp_path / "alpha.webp")
    grey.save(tmp_path / "grey.pgm")
    grey.convert("LA").save(tmp_path / "la.png")
    grey.convert("1").save(tmp_path / "one.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 17).save(tmp_path / "sixteen.png")
    Image.fromarray(np.asarray(grey).astype(np.float32) / 255).save(tmp_path / "float.tif")
    for path in sorted(tmp_path.iterdir()):
        agree(path, SMALL)
        agree(path, GREY)


def test_an_interpolation_that_is_not_known():
    with pytest.raises(PlanishError, match="'random' is not known"):
        to_input(noise(9, 9), changed(SMALL, interpolation="random"))


def test_a_hair_is_not_blown_up(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    hair = Image.new("L", (50_000, 1))
    with pytest.raises(PlanishError, match="resized to 1400000 x 28"):
        to_input(hair, GREY)
    assert to_input(hair, changed(GREY, crop_mode="squash")).shape == (1, 28, 28)
