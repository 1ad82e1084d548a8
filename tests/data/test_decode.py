"""Files that cannot be read are found before they are needed."""

import numpy as np
from PIL import Image

from planish.data.decode import find_unreadable


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
    bad = find_unreadable([good, cut_png, cut_jpg, text, bomb], 3, lambda *seen: told.append(seen))
    assert sorted(bad) == [1, 2, 3, 4]
    assert "9999" in bad[4]
    assert "truncated" in bad[2]
    assert told == [(5, 5)]
