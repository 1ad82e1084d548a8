"""What was decoded once is not decoded again, unless it may have changed; whatever is wrong with the table."""

from __future__ import annotations

import os
import sqlite3

import pytest
from PIL import Image

from planish.data import decode, load_data, scanned
from planish.data.scanned import ScanCache, Scanned, cache_folder, key_of
from planish.models import Preprocessing
from tests.data.pictures import as_samples, assert_same, encoded, write_files, write_tar

P = Preprocessing((3, 8, 8), crop_pct=1.0)
FILES = {f"{name}/{i}.png": encoded(100 * k + i) for k, name in enumerate("ab") for i in range(6)}


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Every image that is decoded while the data are loaded; the cache is in a folder of the test."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scanned, "WORTH", 5)
    seen, real = [], decode.read_encoded
    monkeypatch.setattr(decode, "read_encoded", lambda source: (seen.append(str(source)), real(source))[1])
    return seen


def loaded(source, decoded, **options):
    del decoded[:]
    data = load_data(source, P, **options)
    return data, len(decoded)


def test_the_second_start_reads_nothing_and_finds_the_same(tmp_path, decoded):
    folder = write_files(tmp_path / "images", {**FILES, "a/bad.png": b"no"})
    told = []
    first, count = loaded(folder, decoded, limit_bad=1.0)
    assert count == len(FILES) + 1
    second, count = loaded(folder, decoded, limit_bad=1.0, progress=lambda *seen: told.append(seen))
    assert count == 1  # the bad one is tried again
    assert told[-1] == (13, 13)
    assert_same(first, second)
    assert (first.notes, first.content) == (second.notes, second.content)


def test_what_changed_is_read_again(tmp_path, decoded):
    folder = write_files(tmp_path / "images", FILES)
    first, _ = loaded(folder, decoded)
    path = folder / "a" / "3.png"
    status = path.stat()
    path.write_bytes(encoded(77))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (folder / "b" / "7.png").write_bytes(b"no")
    second, count = loaded(folder, decoded, limit_bad=1.0)
    assert count == 2
    assert second.content != first.content
    assert any("b/7.png" in note for note in second.notes)


def test_another_model_or_limit_judges_the_sides_anew(tmp_path, decoded, monkeypatch):
    write_files(tmp_path / "images", FILES)
    Image.new("L", (3000, 1)).save(tmp_path / "images" / "a" / "hair.png")
    assert len(loaded(tmp_path / "images", decoded)[0].train) == 11
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    data, count = loaded(tmp_path / "images", decoded, limit_bad=1.0)
    assert count == 0
    assert "a/hair.png (an image of 3000 x 1 pixels would be resized to 24000 x 8" in data.notes[0]


@pytest.mark.parametrize("form", ["shards", "saved"])
def test_shards_and_saved_data_sets_are_known_too(tmp_path, decoded, form):
    def write(files):
        if form == "shards":
            return write_tar(tmp_path / "t.tar", as_samples(files, ["a", "b"]))
        datasets = pytest.importorskip("datasets", reason="needs planish[data]")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {
            "image": [{"bytes": d, "path": None} for d in files.values()],
            "label": [int(n[0] == "b") for n in files],
        }
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    source = write(FILES)
    first, count = loaded(source, decoded)
    assert count == 12
    second, count = loaded(source, decoded)
    assert count == 0
    assert_same(first, second)
    source = write({**FILES, "a/0.png": encoded(55)})
    third, count = loaded(source, decoded)
    assert count == 12
    assert third.content != first.content


@pytest.mark.parametrize("content", [b"no table", b""])
def test_a_damaged_table_is_a_note_and_everything_is_read(tmp_path, decoded, content):
    folder = write_files(tmp_path / "images", FILES)
    first, _ = loaded(folder, decoded)
    (table,) = (tmp_path / "cache").iterdir()
    table.write_bytes(content)
    second, count = loaded(folder, decoded)
    assert count == 12
    assert_same(first, second)
    assert any(f"{table} cannot be used" in note for note in second.notes) == (content != b"")


def test_rows_of_another_kind_are_not_believed(tmp_path):
    cache = ScanCache(tmp_path / "t.sqlite")
    key = b"k" * 16
    cache.add({key: Scanned(b"d" * 16, 3, 4)})
    assert cache.look_up([key, None]) == {key: Scanned(b"d" * 16, 3, 4)}
    for values in (("text", 3, 4), (b"short", 3, 4), (b"d" * 16, "3", 4)):
        with sqlite3.connect(tmp_path / "t.sqlite") as table:
            table.execute("UPDATE images SET digest = ?, width = ?, height = ?", values)
        found = cache.look_up([key])
        assert found == ({} if values[1] == 3 else {key: Scanned(b"d" * 16, 3, 4)})  # SQLite makes "3" an integer
    cache.close()


def test_a_place_that_cannot_be_used_and_none(tmp_path, decoded, monkeypatch):
    folder = write_files(tmp_path / "images", FILES)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "file"))
    data, count = loaded(folder, decoded)
    assert count == 12
    assert any("cannot be used" in note for note in data.notes)
    monkeypatch.setenv("PLANISH_CACHE", "")
    assert cache_folder() is None
    data, _ = loaded(folder, decoded)
    assert not any("cannot be used" in note for note in data.notes)
    monkeypatch.delenv("PLANISH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "planish"


def test_few_images_leave_no_table(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(scanned, "WORTH", 13)
    loaded(write_files(tmp_path / "images", FILES), decoded)
    assert not (tmp_path / "cache").exists()


def test_no_name_of_a_file_stands_in_the_table(tmp_path, decoded):
    loaded(write_files(tmp_path / "secret-folder", FILES), decoded)
    (table,) = (tmp_path / "cache").iterdir()
    assert b"secret" not in table.read_bytes()
    assert "secret" not in table.name


def test_each_of_several_processes_begins_elsewhere(monkeypatch):
    monkeypatch.setattr(decode, "_CHUNK", 10)
    monkeypatch.setenv("WORLD_SIZE", "4")
    orders = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        orders.append(list(decode._starts(75)))
    assert [order[0] for order in orders] == [0, 20, 40, 60]
    assert all(sorted(order) == list(range(0, 75, 10)) for order in orders)


def test_the_order_of_the_bad_ones_does_not_depend_on_the_process(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    monkeypatch.setattr(decode, "_CHUNK", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert list(decode.check_images(paths, P).unreadable) == list(range(9))


def test_the_key_changes_with_the_decoder(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    before = key_of(path)
    monkeypatch.setattr(scanned.PIL, "__version__", "0")
    assert key_of(path) != before
    assert key_of(tmp_path / "absent") is None
