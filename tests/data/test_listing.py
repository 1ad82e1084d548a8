"""What all sources share: test images that are training images are told."""

import shutil

import pytest
from PIL import Image

from planish.data import load_data
from planish.models import Preprocessing
from tests.data.pictures import as_samples, assert_same, pictures, write_files, write_table, write_tar

P = Preprocessing((3, 8, 8), crop_pct=1.0)


def overlap(data):
    return [note for note in data.notes if "byte for byte" in note]


def test_identical_files_in_both_splits_are_counted_and_named(tmp_path):
    for split, first in (("train", 0), ("val", 1000)):
        files = pictures(each=3)
        write_files(tmp_path / split, {name: data + bytes([first // 1000]) for name, data in files.items()})
    assert overlap(load_data(tmp_path, P)) == []
    shutil.copy(tmp_path / "train" / "bee" / "001.png", tmp_path / "val" / "ant" / "900.png")  # whatever the class
    assert overlap(load_data(tmp_path, P)) == [
        "1 of 10 test images are also training images, byte for byte, "
        "so the measured accuracy is not that on new images: val/ant/900.png is train/bee/001.png"
    ]
    for i in range(6):
        shutil.copy(tmp_path / "train" / "bee" / "002.jpg", tmp_path / "val" / "cow" / f"90{i}.jpg")
    (note,) = overlap(load_data(tmp_path, P))
    assert note.startswith("7 of 16 test images")
    assert note.endswith("and 2 more")


def test_twins_that_a_random_split_separates_and_lines_in_both_splits(tmp_path):
    files = pictures(names=("ant", "bee"), each=1)
    twins = {f"{name[:4]}{i}.png": data for name, data in files.items() for i in range(5)}
    folder = write_files(tmp_path / "folder", twins)
    assert overlap(load_data(folder, P))[0].startswith("2 of 2 test images")
    table = [{"path": name, "label": name[:3], "split": split} for name in twins for split in ("train", "val")]
    write_table(folder / "t.csv", table)
    (note,) = overlap(load_data(folder / "t.csv", P))
    assert note.startswith("10 of 10 test images")
    assert "ant/0.png is ant/0.png; " in note


@pytest.mark.parametrize("bad", ["train", "val"])
def test_unreadable_files_are_no_overlap(tmp_path, bad):
    for split in ("train", "val"):
        write_files(tmp_path / split, {name: data + split.encode() for name, data in pictures(each=11).items()})
    for name in ("ant/003.png", "ant/001.png"):
        (tmp_path / bad / name).write_bytes(b"")
    data = load_data(tmp_path, P)
    assert data.notes[0].startswith("2 of 66 images could not be read")
    assert overlap(data) == []


def test_bad_images_are_treated_alike_in_all_sources(tmp_path, monkeypatch):
    files = pictures(each=40)
    files["ant/000.png"] = b""
    files["ant/001.png"] = files["ant/001.png"][:-60]
    files["bee/001.png"] = b"no image"
    Image.new("L", (60, 60)).save(tmp_path / "bomb.png")
    files["cow/001.png"] = (tmp_path / "bomb.png").read_bytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    folder = write_files(tmp_path / "images", files)
    table = write_table(folder / "t.csv", [{"path": name, "label": name[:3]} for name in files])
    shards = write_tar(folder / "t.tar", as_samples(files, ["ant", "bee", "cow"], "json"))
    expected = load_data(folder, P)
    (note,) = [note for note in expected.notes if "could not be read" in note]
    assert note.startswith("4 of 120 images")
    assert "cow/001.png (60 x 60 pixels are more than the limit of 3000)" in note
    for source in (table, shards):
        data = load_data(source, P)
        assert_same(data, expected)
        assert note in [other.replace("t.tar:", "") for other in data.notes]
