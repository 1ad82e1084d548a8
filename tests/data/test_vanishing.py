"""Files that vanish or change while they are in use: replaced in training, by count and name; an error elsewhere."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import pytest
import torch

from planish.data import encoded, load_data, make_loader
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.data.pictures import encoded as image
from tests.data.pictures import write_files

P = Preprocessing((3, 8, 8), crop_pct=1.0, interpolation="bilinear")
FILES = {f"{name}/{i:02}.png": image(100 * k + i) for k, name in enumerate("ab") for i in range(15)}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "_PAUSE", 0.0)
    return load_data(write_files(tmp_path, FILES), P)


def batches(loader):
    return [(images.clone(), labels.tolist()) for images, labels in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_in_training_the_next_of_its_class_takes_its_place_and_all_is_told(data, workers):
    loader = make_loader(data.train, 4, shuffle=True, seed=0, augment=True, workers=workers)
    before = batches(loader)
    gone = data.train.samples[11]  # the last of its class; the next one is the first
    assert data.train.labels[11:13] == [0, 1]
    gone.unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        after = batches(loader)
        again = batches(loader)
    if not workers:  # those of a worker process go to its own stderr
        assert [str(w.message).split(" could be read")[0] for w in seen] == [str(gone)]
    assert loader.dataset.replaced == data.train.replaced == [str(gone)]
    assert [labels for _, labels in after] == [labels for _, labels in before]
    changed = sum(
        not torch.equal(a, b) for (x, _), (y, _) in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert changed == 1
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(after, again, strict=True))


def test_what_takes_its_place_is_augmented_as_it_would_have_been(data):
    augmented = data.train.augmented()
    other = augmented[3]
    data.train.samples[2].write_bytes(data.train.samples[3].read_bytes())
    copied = augmented[2]
    data.train.samples[2].write_bytes(b"")
    with pytest.warns(UserWarning, match="another image of its class"):
        replaced = augmented[2]
    assert torch.equal(replaced[0], copied[0])
    assert not torch.equal(replaced[0], other[0])


def test_in_measuring_and_calibration_it_is_one_sentence(data):
    for dataset in (data.test, data.train):
        gone = dataset.samples[1]
        content = gone.read_bytes()
        gone.unlink()
        with pytest.raises(PlanishError) as caught:
            batches(make_loader(dataset, 4, shuffle=False, seed=0, augment=False))
        assert str(caught.value) == (
            f"{gone} could be read when the data were loaded and cannot now (no such file or directory): put it back"
        )
        assert dataset.replaced == []
        gone.write_bytes(content)
        batches(make_loader(dataset, 4, shuffle=False, seed=0, augment=False))


def test_a_file_that_was_damaged_meanwhile_counts_as_gone(data):
    data.train.samples[0].write_bytes(data.train.samples[0].read_bytes()[:60])
    with pytest.warns(UserWarning, match="(?i)truncated"):
        data.train.augmented()[0]
    assert len(data.train.replaced) == 1


def test_too_many_are_an_error(data, monkeypatch):
    for sample in data.train.samples[:2]:
        sample.unlink()
    with (
        pytest.warns(UserWarning, match="takes its place"),
        pytest.raises(PlanishError, match="2 of 24 training images can no longer be read"),
    ):
        batches(make_loader(data.train, 4, shuffle=True, seed=0, augment=True))


def test_a_class_without_any_image_is_an_error(data, monkeypatch):
    monkeypatch.setattr(encoded, "MAX_REPLACED", 100)
    data.train._lost[:12] = True
    with pytest.raises(PlanishError, match="no image of the class of"):
        data.train.augmented()[3]


def test_a_file_system_that_is_away_for_a_moment_is_asked_again(data, monkeypatch):
    read, calls = Path.open, []

    def once(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, *arguments, **options)

    expected = data.test[0][0]
    monkeypatch.setattr(Path, "open", once)
    assert torch.equal(data.test[0][0], expected)
    assert len(calls) == 2
    monkeypatch.setattr(encoded, "read_image", lambda *_: (calls.append(0), (_ for _ in ()).throw(OSError("cut")))[1])
    with pytest.raises(PlanishError, match="cut"):
        data.test[0]
    assert len(calls) == 3  # what is there and no image is not read again


def test_the_content_of_all_images_is_known(tmp_path, data):
    same = load_data(tmp_path, P)
    assert same.content == data.content != ""
    assert load_data(tmp_path, P, seed=1).content != data.content  # another split
    (tmp_path / "a" / "03.png").write_bytes(image(999))
    assert load_data(tmp_path, P).content != data.content
