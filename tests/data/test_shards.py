"""Tar shards: the same images as class folders, exact order, and one sentence for each kind of bad shard."""

import pickle
import shutil
import subprocess
import tarfile

import pytest
import torch

from planish.data import load_data, make_loader, set_epoch
from planish.data.shards import expand
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.data.pictures import as_samples, assert_same, encoded, pictures, write_files, write_tar

P = Preprocessing((3, 8, 8), interpolation="bilinear", crop_pct=1.0)
NAMES = ["ant", "bee", "cow"]


def shards(folder, files, stem, parts=2, labels="cls", start=0):
    """The files dealt to several shards, so that every class lies in each."""
    for part in range(parts):
        some = {name: data for i, (name, data) in enumerate(files.items()) if i * parts // len(files) == part}
        write_tar(folder / f"{stem}-{start + part:04}.tar", as_samples(some, NAMES, labels))
    return folder


def both_splits(tmp_path):
    train = pictures(each=5)
    val = {name: encoded(7000 + i, ending=name[-3:].replace("ebp", "webp")) for i, name in enumerate(pictures(each=3))}
    for split, files in (("train", train), ("val", val)):
        write_files(tmp_path / "images" / split, files)
    return train, val, load_data(tmp_path / "images", P)


@pytest.mark.parametrize("labels", ["cls", "json"])
def test_a_folder_of_shards_equals_class_folders(tmp_path, labels):
    train, val, expected = both_splits(tmp_path)
    folder = shards(shards(tmp_path / "tars", train, "train", 3, labels), val, "val", 1, labels)
    if labels == "cls":
        assert load_data(folder, P).classes == ["0", "1", "2"]
        (folder / "classes.txt").write_text("\n".join(NAMES))
    data = load_data(folder, P)
    assert_same(data, expected)
    assert data.notes == []
    assert data.name == "tars"
    assert_same(load_data(str(folder / "train-{0000..0002}.tar"), P), expected)
    shards(folder, val, "test", 2, labels)
    assert any("split test were left out" in note for note in load_data(folder, P).notes)


def test_shards_without_splits_are_split_like_the_folder(tmp_path):
    files = pictures()
    folder = shards(tmp_path / "tars", files, "my", 4, "json", start=8)
    data = load_data(folder / "my-{0008..0011}.tar", P, seed=2)
    assert_same(data, load_data(write_files(tmp_path / "images", files), P, seed=2))
    assert data.name == "my"
    assert any("20 % of each class" in note for note in data.notes)
    one = write_tar(tmp_path / "all.tar", as_samples(files, NAMES, "json"))
    assert_same(load_data(one, P), load_data(tmp_path / "images", P))


def test_ranges_are_those_of_bash(tmp_path):
    for pattern in ("{08..10}.tar", "{8..10}.tar", "{0..12}.tar", "{1..03}b{1..2}.tar", "a.tar", "c{3..3}/{00..1}.tar"):
        told = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
        names = told.split()
        write_files(tmp_path, dict.fromkeys(names, b""))
        assert [str(path.relative_to(tmp_path)) for path in expand(tmp_path / pattern)] == names
    for pattern in ("a{3..1}.tar", "a{0..999999999}.tar"):
        with pytest.raises(PlanishError, match="no or too many numbers"):
            expand(tmp_path / pattern)


def test_the_order_is_a_function_of_seed_and_epoch_in_workers_too(tmp_path):
    folder = shards(tmp_path / "tars", pictures(), "train", 3)
    data = load_data(folder, P, seed=1, augment=True)
    assert pickle.loads(pickle.dumps(data.train.samples)) == data.train.samples  # as to a spawned worker
    found = []
    for workers in (0, 2):
        loader = make_loader(data.train, 4, shuffle=True, seed=5, workers=workers)
        set_epoch(loader, 2)
        found.append(list(loader))
    assert len(found[0]) == 4
    for (a, la), (b, lb) in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)


def test_gnu_tar_and_long_names_are_read(tmp_path):
    files = {f"{'deep' * 24}/{name}": data for name, data in pictures().items()}
    samples = as_samples({name.partition("/")[2]: data for name, data in files.items()}, NAMES, "json")
    write_files(tmp_path / "in" / ("deep" * 24), samples)
    write_files(tmp_path / "in", {"._junk.png": b"x", "ant/.hidden.jpg": b"x", "README": b"x", "ant/note.txt": b"x"})
    for flavour in ("gnu", "pax", "ustar"):
        subprocess.run(
            ["tar", f"--format={flavour}", "--sort=name", "-C", tmp_path / "in", "-cf", tmp_path / "t.tar", "."],
            check=True,
        )
        data = load_data(tmp_path / "t.tar", P)
        assert_same(data, load_data(write_files(tmp_path / "images", pictures()), P))
        assert any("1 samples" in note for note in data.notes)


def test_bad_images_are_named_and_skipped_and_twins_are_told(tmp_path):
    files = pictures(each=20)
    files["bee/007.png"] = files["bee/007.png"][:60]
    files["cow/000.png"] = b""
    folder = shards(tmp_path, files, "train")
    shards(tmp_path, {name: files[name] for name in list(files)[1::5]}, "val", 1)
    data = load_data(folder, P)
    assert data.notes[0].startswith("2 of 72 images could not be read and were skipped: train-0000.tar:bee/007")
    assert "train-0001.tar:cow/000.png (cannot identify image file)" in data.notes[0]
    (note,) = [note for note in data.notes if "byte for byte" in note]
    assert note.startswith("12 of 12 test images")
    assert "val-0000.tar:ant/001.png is train-0000.tar:ant/001.png" in note
    (folder / "train-0000.tar").write_bytes(b"")
    with pytest.raises(PlanishError, match=r"train-0000\.tar:ant/000\.png could be read .* shorter than when"):
        data.train[0]


def test_bad_shards_get_one_sentence(tmp_path):
    files = pictures(each=2)
    good = as_samples(files, NAMES)

    def expect(words, path):
        with pytest.raises(PlanishError, match=words) as caught:
            load_data(path, P)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    def tar(members):
        return write_tar(tmp_path / "t.tar", members)

    plain = tar(good).read_bytes()
    shutil.copy(tmp_path / "t.tar", tmp_path / "t2.tar")
    expect("2 of 3 shards do not exist: .*t1.tar; .*t3.tar; expected a folder", tmp_path / "t{1..3}.tar")
    for mode, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        with tarfile.open(tmp_path / f"t.tar.{mode}", f"w:{mode}") as file:
            file.add(tmp_path / "t.tar", "t")
        expect(rf"t\.tar\.{mode} is compressed \({name}\).*unpack it to a plain \.tar", tmp_path / f"t.tar.{mode}")
    (tmp_path / "hidden").mkdir()
    shutil.copy(tmp_path / "t.tar.gz", tmp_path / "hidden" / "train-0.tar")  # whatever it is called
    expect("is compressed", tmp_path / "hidden")
    fewer = {name: data for name, data in good.items() if "0.cls" not in name}
    expect("3 of 6 images have no label: .*ant/000.png; .*expected KEY.cls", tar(fewer))
    expect("ant/000.cls holds no label .*expected an integer", tar({**good, "ant/000.cls": b"ant"}))
    for content in (b"[", b'{"label": 1.5}', b'{"label": true}', b"[" * 100_000):
        expect(r"ant/000\.json holds no label .*expected JSON", tar({**good, "ant/000.json": content}))
    expect(
        "2 images have no label|1 of 7 images have no label", tar({**good, "x.png": b"", "x.json": b'{"label": null}'})
    )
    expect("'ant/000' has two images", tar({**good, "ant/000.webp": b""}))
    dotted = {name.replace(".png", ".0.png").replace(".jpg", ".0.jpg"): data for name, data in good.items()}
    expect("none of 6 samples has an image.*without a dot", tar(dotted))
    expect("lists no images", tar({"README": b""}))
    expect("one class only", tar({name: data for name, data in good.items() if name < "b"}))
    expect("1 of 6 labels are below 0", tar({**good, "ant/000.cls": b"-1"}))
    broken = tmp_path / "broken.tar"
    second = plain.index(b"ant/001.png")
    for content in (plain[: second + 300], plain[:second], plain[: second + 600], plain + plain, b"", b"hello" * 500,
                    plain[:second] + b"x" * 512 + plain[second + 512 :]):  # fmt: skip
        broken.write_bytes(content)
        expect("damaged|cannot be read as an uncompressed tar file", broken)
    (tmp_path / "link").symlink_to(tmp_path / "t.tar")
    tar(good)
    with tarfile.open(tmp_path / "t.tar", "a") as file:
        file.add(tmp_path / "link", "linked.png")
    expect("linked.png is stored as a link", tmp_path / "t.tar")
    for split in ("val", "test"):
        write_tar(tmp_path / "untrained" / f"{split}-0.tar", good)
    expect("splits are 'test', 'val', and none is called 'train'", tmp_path / "untrained")
