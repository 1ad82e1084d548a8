"""Every kind of bad image in every place where images are read: named, counted, and treated alike."""

from __future__ import annotations

import io
import os
import re

import pytest
import torch
from PIL import Image

from planish.data import load_data, load_unlabelled
from planish.errors import PlanishError
from planish.images import decode
from planish.models import Preprocessing
from tests.data.bad_pictures import ALL, LIMIT, READ, REFUSED
from tests.data.pictures import as_samples, encoded, write_files, write_table, write_tar

P = Preprocessing((3, 8, 8), crop_pct=1.0, interpolation="bilinear")
GOOD = {f"{name}/{i}.png": encoded(10 * k + i) for k, name in enumerate(("good", "odd")) for i in range(3)}
FILES = {**{f"odd/{name}": data for name, data in ALL.items()}, **GOOD}


@pytest.fixture(scope="module")
def lowered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)
        patch.setattr("planish.data.listing.enumerated", lambda names: "; ".join(names))  # all, not the first five
        yield


def from_source(source, names=lambda sample: str(sample)):
    """What became of the files of a source: nothing for what is read, else the reason; and the note."""
    data = load_data(source, P, limit_bad=1.0)
    for part in (data.train, data.test):
        for i in range(len(part)):
            assert torch.isfinite(part[i][0]).all()
    kept = {names(sample) for part in (data.train, data.test) for sample in part.samples}
    (note,) = [note for note in data.notes if "could not be read" in note]
    return kept, note


def last(sample):
    return re.split(r"[/:]", str(sample))[-1]


def in_folder(place):
    return from_source(write_files(place, FILES), last)


def in_table(place):
    write_files(place, FILES)
    return from_source(write_table(place / "t.csv", [{"path": n, "label": n[:3]} for n in FILES]), last)


def numbered(name):
    """A key of its own for each: the names of samples in a shard end at the first dot."""
    folder, _, file = name.partition("/")
    stem, _, ending = file.rpartition(".")
    return f"{folder}/{stem}-{ending}.{ending}"


def in_shards(place):
    files = {numbered(name): data for name, data in FILES.items()}
    shard = write_tar(place / "t.tar", as_samples(files, ["good", "odd"]))
    kept, note = from_source(shard, last)
    for name in ALL:
        note = note.replace(numbered(f"x/{name}")[2:], name)
    return {re.sub(r"-\w+(\.\w+)$", r"\1", name) for name in kept}, note


def in_data_set(place):
    datasets = pytest.importorskip("datasets", reason="needs planish[data]")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["good", "odd"])})
    rows = {"image": [{"bytes": d, "path": None} for d in FILES.values()], "label": [int(n[0] == "o") for n in FILES]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(place / "saved"))
    names = [name.partition("/")[2] for name in FILES]
    kept, note = from_source(place / "saved", lambda row: names[row.index])
    return kept, re.sub(r"row\[(\d+)\]", lambda match: names[int(match[1])], note)


def in_unlabelled_folder(place):
    images, (note,) = load_unlabelled(write_files(place, FILES), P, limit_bad=1.0)
    assert all(torch.isfinite(images[i][0]).all() for i in range(len(images)))
    return {path.name for path in images.samples}, note


def test_unlabelled_images_have_a_hash(tmp_path):
    """So that a training that goes on can tell whether they are still the same."""
    hashes = [load_unlabelled(write_files(tmp_path / name, GOOD), P)[0].content for name in "ab"]
    assert hashes[0] == hashes[1] != ""
    first = next(path for path in sorted((tmp_path / "b").rglob("*")) if path.is_file())
    first.write_bytes(first.read_bytes() + b"\0")  # still an image
    assert load_unlabelled(tmp_path / "b", P)[0].content != hashes[0]


PLACES = (in_folder, in_table, in_shards, in_data_set, in_unlabelled_folder)


@pytest.fixture(scope="module", params=PLACES, ids=lambda place: place.__name__)
def outcome(request, lowered, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("name", READ)
def test_what_is_read(outcome, name):
    kept, note = outcome
    assert name in kept
    assert name not in note


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_with_the_reason(outcome, name):
    kept, note = outcome
    assert name not in kept
    assert re.search(rf"{re.escape(name)} \([^;]*{re.escape(REFUSED[name][1])}", note), note


def test_what_is_refused_is_counted(outcome):
    assert outcome[1].startswith(f"{len(REFUSED)} of {len(FILES)} images could not be read and were skipped: ")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="needs planish[onnx]")
    from planish.deploy.classify import Classifier
    from tests.deploy.tiny_onnx import save_tiny

    return Classifier(save_tiny(tmp_path_factory.mktemp("model") / "m.onnx"))


@pytest.mark.parametrize("name", ALL)
def test_classify_and_the_demo_agree_with_the_sources(lowered, classifier, tmp_path, name):
    from planish.deploy.comparison import BadPicture, compare

    (tmp_path / name).write_bytes(ALL[name])
    if name in READ:
        answer = classifier.classify([tmp_path / name])[0]
        shown = compare([classifier], ALL[name])["models"][0]["top"]
        assert [one["label"] for one in shown] == list(answer.labels)
        return
    words = REFUSED[name][1].replace("cannot identify", "is not an image that can be read")
    with pytest.raises(PlanishError, match=re.escape(words)) as caught:
        classifier.classify([tmp_path / name])
    assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(BadPicture, match=re.escape(words)):
        compare([classifier], ALL[name])


def test_more_bad_images_than_the_limit_are_an_error_in_every_place(tmp_path, lowered):
    folder = write_files(tmp_path, FILES)
    table = write_table(folder / "t.csv", [{"path": n, "label": n[:3]} for n in FILES])
    for load in (lambda: load_data(folder, P), lambda: load_data(table, P), lambda: load_unlabelled(folder, P)):
        words = f"{len(REFUSED)} of {len(FILES)} images cannot be read, more than the 5%"
        with pytest.raises(PlanishError, match=words):
            load()


def test_pipes_devices_and_missing_files_are_refused_without_waiting(tmp_path):
    """A pipe that nobody writes to, and a device that never ends."""
    write_files(tmp_path, GOOD)
    os.mkfifo(tmp_path / "odd" / "pipe.png")
    (tmp_path / "odd" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "odd" / "nowhere.png").symlink_to(tmp_path / "absent")
    (tmp_path / "odd" / "self.png").symlink_to(tmp_path / "odd" / "self.png")
    data = load_data(tmp_path, P, limit_bad=1.0)
    assert len(data.train) + len(data.test) == len(GOOD)
    (note,) = [note for note in data.notes if "could not be read" in note]
    assert note.startswith("4 of 10")
    for words in ("pipe.png (no regular file)", "zero.png (no regular file)", "nowhere.png (no such file"):
        assert words in note


def test_an_animation_shows_its_first_frame_and_a_camera_on_its_side_stands_up():
    for name in ("animated.gif", "animated.png", "animated.webp"):
        assert abs(decode(io.BytesIO(READ[name]), 1).getpixel((4, 4)) - 10) <= 2
    assert decode(io.BytesIO(READ["on-its-side.jpg"]), 1).size == (12, 10)
