"""Class folders: both layouts, the transform, and one sentence for each kind of bad folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from planish.data import load_data
from planish.errors import PlanishError
from planish.models import Preprocessing

P = Preprocessing((3, 32, 32), interpolation="bilinear", crop_pct=0.8)


def fill(folder, n, size=(48, 40)):
    folder.mkdir(parents=True)
    for i in range(n):
        generator = np.random.default_rng([i, len(str(folder))])
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:03}.png")


def test_two_splits_and_torchvision_as_oracle(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, n)
    data = load_data(tmp_path, P)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, ["cat", "dog"])
    assert data.train_labels == [0, 0, 0, 1, 1, 1]
    assert data.notes == []
    bilinear = tv.InterpolationMode.BILINEAR
    oracle = tv.Compose(
        [tv.Resize(40, interpolation=bilinear), tv.CenterCrop(32), tv.ToTensor(), tv.Normalize(P.mean, P.std)]
    )
    image = Image.open(tmp_path / "val" / "dog" / "001.png")
    assert torch.equal(data.test[3][0], oracle(image))
    assert data.test[3][1] == 1


def test_class_folders_are_split_within_each_class_by_the_seed(tmp_path):
    fill(tmp_path / "a", 10)
    fill(tmp_path / "b" / "images", 5)  # images may lie deeper
    (tmp_path / "a" / "readme.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    data, again, other = (load_data(tmp_path, P, seed=s) for s in (0, 0, 1))
    assert np.bincount(data.train_labels).tolist() == [8, 4]
    assert np.bincount(data.test.labels).tolist() == [2, 1]
    assert set(data.train.samples).isdisjoint(data.test.samples)
    assert data.test.samples == again.test.samples != other.test.samples
    assert any("set aside" in note for note in data.notes)
    assert any("1 files" in note for note in data.notes)


def test_grey_models_get_grey_images(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 2)
    data = load_data(tmp_path, Preprocessing((1, 16, 16), (0.5,), (0.5,)))
    assert data.train[0][0].shape == (1, 16, 16)


def test_augmentation_depends_on_seed_epoch_index_and_leaves_the_global_state(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 4)
    data = load_data(tmp_path, P, augment=True)
    state = torch.get_rng_state()
    first = [data.train[i][0] for i in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(data.train[5][0], first[5])
    data.train.set_epoch(1)
    assert not torch.equal(data.train[5][0], first[5])
    assert torch.equal(data.test[0][0], load_data(tmp_path, P).test[0][0])


def test_few_bad_images_are_named_and_skipped(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 20, (8, 8))
    (tmp_path / "a" / "007.png").write_bytes(b"no image")
    data = load_data(tmp_path, P)
    assert len(data.train) + len(data.test) == 39
    assert data.notes[0].startswith("1 of 40 images could not be read")
    assert "a/007.png" in data.notes[0]
    with pytest.raises(PlanishError, match="1 of 40 images cannot be read"):
        load_data(tmp_path, P, limit_bad=0.02)


def test_never_more_than_a_hundred_bad_images(tmp_path, monkeypatch):
    monkeypatch.setattr("planish.data.listing.MAX_BAD", 1)
    for name in "ab":
        fill(tmp_path / name, 20, (8, 8))
        (tmp_path / name / "003.png").write_bytes(b"no image")
    with pytest.raises(PlanishError, match=r"2 of 40 .*\(at most 1\)"):
        load_data(tmp_path, P, limit_bad=0.5)


def test_bad_folders_get_one_sentence(tmp_path):
    def expect(words, root):
        with pytest.raises(PlanishError, match=words) as caught:
            load_data(root, P)
        assert "\n" not in str(caught.value)
        assert str(root) in str(caught.value)

    expect("does not exist", tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    expect("is a file", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    expect("is empty", tmp_path / "empty")
    fill(tmp_path / "flat", 2)
    expect("no class folders", tmp_path / "flat")
    fill(tmp_path / "one" / "cat", 2)
    expect("at least two classes", tmp_path / "one")
    for name in "ab":
        (tmp_path / "hollow" / name).mkdir(parents=True)
    expect("hold no images", tmp_path / "hollow")
    fill(tmp_path / "gap" / "a", 2)
    (tmp_path / "gap" / "b").mkdir()
    expect("'b' holds no images", tmp_path / "gap")
    fill(tmp_path / "single" / "a", 2)
    fill(tmp_path / "single" / "b", 1)
    expect("'b' has one image", tmp_path / "single")
    for split, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            fill(tmp_path / "differ" / split / name, 1)
    expect("'b' only in train, 'c' only in test", tmp_path / "differ")


def test_an_image_that_vanishes_is_named(tmp_path):
    for name in "ab":
        fill(tmp_path / name, 2)
    data = load_data(tmp_path, P)
    data.train.samples[0].unlink()
    with pytest.raises(PlanishError, match=str(data.train.samples[0])):
        data.train[0]


def test_numbered_classes_come_with_a_note(tmp_path):
    for name in ("1", "2", "10"):
        fill(tmp_path / name, 2, (8, 8))
    data = load_data(tmp_path, P)
    assert data.classes == ["1", "10", "2"]
    assert any("'10' comes before '2'" in note for note in data.notes)
