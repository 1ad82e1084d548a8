"""Data sets of Hugging Face ``datasets``: the same images as class folders, and one sentence for each bad one."""

import pickle
import sys

import pytest
import torch

from planish.data import load_data, make_loader
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.data.pictures import assert_same, encoded, pictures, write_files

datasets = pytest.importorskip("datasets")
P = Preprocessing((3, 8, 8), interpolation="bilinear", crop_pct=1.0)
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def table(files, image="picture", label="kind", feature=None, **more):
    """A Dataset of encoded files, its labels as ClassLabel or as ``feature``."""
    names = [name.partition("/")[0] for name in files]
    known = feature is None
    columns = {
        image: [{"bytes": data, "path": None} for data in files.values()],
        label: [NAMES.index(name) for name in names] if known or "int" in feature.dtype else names,
        "width": [10.0] * len(files),
    }
    kinds = {
        image: datasets.Image(),
        label: feature or datasets.ClassLabel(names=NAMES),
        "width": datasets.Value("float32"),
    }
    for name, kind in more.items():
        columns[name], kinds[name] = columns[image if isinstance(kind, datasets.Image) else label], kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(path, dataset):
    dataset.save_to_disk(str(path))
    return path


def test_a_saved_data_set_is_split_like_the_folder(tmp_path):
    files = pictures()
    expected = load_data(write_files(tmp_path / "images", files), P, seed=4)
    for number, (image, label, feature) in enumerate(
        [("picture", "kind", None), ("image", "label", None), ("image", "label", datasets.Value("string"))]
    ):
        data = load_data(saved(tmp_path / f"set{number}", table(files, image, label, feature)), P, seed=4)
        assert_same(data, expected)
        assert data.name == f"set{number}"
        assert any("20 % of each class" in note for note in data.notes)
    data = load_data(
        saved(tmp_path / "numbers", table(files, label="label", feature=datasets.Value("int16"))), P, seed=4
    )
    assert data.classes == ["0", "1", "2"]
    assert data.train_labels == expected.train_labels
    formatted = saved(tmp_path / "formatted", table(files).with_format("torch"))
    assert_same(load_data(formatted, P, seed=4), expected)


def test_splits_equal_those_of_folders_and_further_ones_are_left_out(tmp_path):
    train = pictures(each=5)
    val = {name: encoded(7000 + i, ending=name.partition(".")[2]) for i, name in enumerate(pictures(each=3))}
    for split, files in (("train", train), ("val", val)):
        write_files(tmp_path / "images" / split, files)
    splits = {"train": table(train), "validation": table(val), "test": table(train)}
    data = load_data(saved(tmp_path / "set", datasets.DatasetDict(splits)), P)
    assert_same(data, load_data(tmp_path / "images", P))
    assert any("split test was left out" in note for note in data.notes)
    del splits["validation"]
    data = load_data(saved(tmp_path / "twins", datasets.DatasetDict(splits)), P)
    (note,) = data.notes
    assert note.startswith("15 of 15 test images are also training images")
    assert "test[0] is train[0]" in note


def test_rows_go_to_workers(tmp_path):
    data = load_data(saved(tmp_path / "set", table(pictures(each=40))), P)
    sent = pickle.dumps(data.train)
    assert len(sent) < 20_000  # the files are mapped, not sent
    assert torch.equal(pickle.loads(sent)[7][0], data.train[7][0])
    loader = make_loader(data.train, 8, shuffle=False, seed=0, workers=2)
    assert torch.equal(next(iter(loader))[0][7], data.train[7][0])


def test_rows_may_name_files(tmp_path, monkeypatch):
    files = pictures(each=3)
    folder = write_files(tmp_path / "images", files)
    columns = {"image": [str(folder / name) for name in files], "label": [i // 3 for i in range(9)]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    dataset = datasets.Dataset.from_dict(columns, features=kinds)  # save_to_disk would copy the files into it
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: dataset)
    assert_same(load_data("hf:files", P), load_data(folder, P))
    (folder / "ant" / "000.png").unlink()
    with pytest.raises(PlanishError, match=r"1 of 9 images cannot be read.*row\[0\] \(no such file or directory\)"):
        load_data("hf:files", P)


def test_bad_images_are_named_and_skipped(tmp_path):
    files = pictures(each=20)
    files["bee/001.png"] = b"no image"
    data = load_data(saved(tmp_path / "set", table(files)), P)
    assert data.notes[0] == ("1 of 60 images could not be read and were skipped: row[21] (cannot identify image file)")
    columns = {"image": [None, *({"bytes": data, "path": None} for data in pictures().values())], "label": [0] * 19}
    columns["label"][5] = 1
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    missing = saved(tmp_path / "missing", datasets.Dataset.from_dict(columns, features=features))
    with pytest.raises(PlanishError, match=r"1 of 19 images cannot be read.*row\[0\] \(the row has no image\)"):
        load_data(missing, P)


def test_what_is_ambiguous_or_missing_gets_one_sentence(tmp_path):
    files = pictures(each=2)

    def expect(words, dataset):
        path = saved(tmp_path / f"set{len(list(tmp_path.iterdir()))}", dataset)
        with pytest.raises(PlanishError, match=words) as caught:
            load_data(path, P)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    good = table(files)
    expect(r"2 columns of images \(picture, mask\) among picture, kind, width, mask: expected one column of images",
           table(files, mask=datasets.Image()))  # fmt: skip
    twice = table(files, coarse=datasets.ClassLabel(names=NAMES))
    expect(r"2 columns of classes \(kind, coarse\).*select_columns", twice)
    expect("no column of images among kind, width", good.remove_columns("picture"))
    expect("no column of classes among picture, width", good.remove_columns("kind"))
    expect("no column of classes among picture, label", good.remove_columns("kind").rename_column("width", "label"))
    expect("splits are 'dev', 'test', and none is called 'train'", datasets.DatasetDict({"test": good, "dev": good}))
    other = good.cast_column("kind", datasets.ClassLabel(names=["a", "b", "c"]))
    expect("the splits train and test name different classes", datasets.DatasetDict({"train": good, "test": other}))
    hidden = datasets.DatasetDict({"train": good, "test": good.map(lambda row: {"kind": -1})})
    expect("6 of 6 labels of the split test are missing", hidden)
    path = saved(tmp_path / "damaged", good)
    next(path.glob("*.arrow")).write_bytes(b"")
    with pytest.raises(PlanishError, match="damaged cannot be loaded as a data set of Hugging Face datasets: "):
        load_data(path, P)


def test_names_on_the_hub_are_asked_for_by_datasets_alone(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict({"train": table(pictures())})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("hf:someone/insects", P)
    assert data.name == "someone/insects"
    assert data.classes == NAMES
    load_data("hf:someone/insects:small", P)
    assert asked == [(("someone/insects", None), {}), (("someone/insects", "small"), {})]
    with pytest.raises(PlanishError, match="names no data set: expected hf:NAME"):
        load_data("hf:", P)

    def refuse(*args):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(PlanishError, match=r"hf:a/b cannot be loaded .*: no network$"):
        load_data("hf:a/b", P)


def test_without_the_library_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = saved(tmp_path / "set", table(pictures()))
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (path, "hf:someone/insects"):
        with pytest.raises(PlanishError, match=r"pip install 'planish\[data\]'"):
            load_data(source, P)
