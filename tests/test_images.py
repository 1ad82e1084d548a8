"""Files of every mode become upright 8-bit images."""

import warnings

import numpy as np
import pytest
from PIL import Image

from planish.images import decode

GRADIENT = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 6  # at most 228


def pixels(path, channels=1):
    return np.asarray(decode(path, channels))


def test_grey_and_rgb(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "g.png")
    assert np.array_equal(pixels(tmp_path / "g.png"), GRADIENT)
    assert np.array_equal(pixels(tmp_path / "g.png", 3), np.stack([GRADIENT] * 3, -1))


def test_16_bit_keeps_its_gradient(tmp_path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 17).save(tmp_path / "a.png")
    Image.fromarray(GRADIENT.astype(np.int32) * 256).save(tmp_path / "b.tif")
    assert np.array_equal(pixels(tmp_path / "a.png"), GRADIENT)
    assert np.array_equal(pixels(tmp_path / "b.tif"), GRADIENT)
    assert np.array_equal(pixels(tmp_path / "a.png", 3)[..., 2], GRADIENT)


def test_float_images_in_either_range(tmp_path):
    Image.fromarray((GRADIENT / 255).astype(np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(GRADIENT.astype(np.float32)).save(tmp_path / "bytes.tif")
    assert np.array_equal(pixels(tmp_path / "unit.tif"), GRADIENT)
    assert np.array_equal(pixels(tmp_path / "bytes.tif"), GRADIENT)


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    Image.new("RGB", (32, 32), (200, 40, 60)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "c.jpg", 3).astype(int) - (200, 40, 60)).max() <= 6


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    Image.fromarray(GRADIENT).save(tmp_path / "e.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "e.png"), np.rot90(GRADIENT, -1))


def test_palette_and_alpha_become_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(tmp_path / "a.png")
    Image.new("P", (4, 4), 1).save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert pixels(tmp_path / "a.png", 3)[0, 0].tolist() == [10, 20, 30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "p.png", 3).shape == (4, 4, 3)


def test_decode_raises_on_a_truncated_file(tmp_path):
    Image.fromarray(GRADIENT).resize((200, 200)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    with pytest.raises(OSError, match="truncated"):
        decode(tmp_path / "a.jpg", 1)
