"""Images that cannot be read are found before they are needed."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from planish.data import decode
from planish.data.decode import check_images, read_image
from planish.models import Preprocessing

P = Preprocessing((3, 8, 8), crop_pct=1.0)


def test_unreadable_files_are_found_and_progress_is_told(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    good, cut_png, cut_jpg, text, bomb = (tmp_path / n for n in ("g.png", "c.png", "c.jpg", "t.png", "b.png"))
    for path in (good, cut_png, cut_jpg):
        Image.fromarray(noise).save(path)
    for path in (cut_png, cut_jpg):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    text.write_text("no image")
    Image.new("L", (100, 100)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    told = []
    paths = [good, cut_png, cut_jpg, text, bomb, tmp_path / "absent.png", tmp_path]
    checked = check_images(paths, P, lambda *seen: told.append(seen))
    bad = checked.unreadable
    assert sorted(bad) == [1, 2, 3, 4, 5, 6]
    assert "9999" in bad[4]
    assert "truncated" in bad[2]
    assert (bad[3], bad[5], bad[6]) == ("cannot identify image file", "no such file or directory", "is a directory")
    assert told == [(7, 7)]
    assert checked.digests == {0: hashlib.blake2b(good.read_bytes(), digest_size=16).digest()}


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("L", (9, 9)).save(path)
    assert read_image(path, P).mode == "RGB"
    monkeypatch.setattr(decode, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="more than the limit of 10"):
        read_image(path, P)


def test_many_images_are_checked_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_CHUNK", 3)
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        Image.new("L", (i + 1, 1)).save(path)
    paths[4].write_bytes(b"")
    told = []
    checked = check_images(paths, P, lambda *seen: told.append(seen))
    assert list(checked.unreadable) == [4]
    assert sorted(checked.digests) == [0, 1, 2, 3, 5, 6, 7]
    assert told == [(8, 8)]
