"""CSV files: the same images as class folders, and one sentence for each kind of bad file."""

import random

import pytest

from planish.data import load_data
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.data.pictures import assert_same, encoded, pictures, write_files, write_table

P = Preprocessing((3, 8, 8), interpolation="bilinear", crop_pct=1.0)
NAMES = ["ant", "bee", "cow"]


def rows(files, folder="", label=lambda name: name, **more):
    return [{"path": folder + name, "label": label(name.partition("/")[0]), **more} for name in files]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_without_splits_a_table_equals_the_folder_in_any_order_of_its_lines(tmp_path, ending):
    files = pictures()
    files |= {"bee/2/000.png": encoded(1), "bee/000/1.png": encoded(2), "bee/1.png": encoded(3)}  # folders inside
    folder = write_files(tmp_path / "images", files)
    table = rows(files, "images/")
    random.Random(0).shuffle(table)
    data = load_data(write_table(tmp_path / f"my.{ending}", table), P, seed=3)
    assert_same(data, load_data(folder, P, seed=3))
    assert data.name == "my"
    assert any("20 % of each class were set aside as one (seed 3)" in note for note in data.notes)


def test_given_splits_equal_those_of_folders(tmp_path):
    train, val = pictures(each=5), pictures(each=2)
    val = {name: encoded(7000 + i) for i, name in enumerate(val)}
    write_files(tmp_path / "train", train)
    write_files(tmp_path / "val", val)
    expected = load_data(tmp_path, P)
    for word in ("val", "validation", "valid", "test", "Val"):
        table = rows(train, "train/", split="TRAIN") + rows(val, "val/", split=word)
        data = load_data(write_table(tmp_path / "table.csv", table), P)
        assert_same(data, expected)
        assert data.notes == []
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "train.csv", rows(train, "../train/"))
    write_table(tmp_path / "tables" / "test.csv", rows(val, "../val/"))
    assert_same(load_data(tmp_path / "tables", P), expected)
    write_table(tmp_path / "train.csv", rows(train))  # beside train/: the class folders count
    assert_same(load_data(tmp_path, P), expected)


def test_the_first_split_to_measure_on_counts_and_others_are_told(tmp_path):
    files = pictures()
    folder = write_files(tmp_path, files)
    table = rows(files, split="train") + rows(files, split="test") + rows(list(files)[:13], split="val")
    data = load_data(write_table(folder / "t.csv", table), P)
    assert len(data.test) == 13
    assert any("'test' (18 images) left out; 'train' and 'val' are used" in note for note in data.notes)


def test_integers_are_numbered_in_their_order_and_named_by_classes_txt(tmp_path):
    folder = write_files(tmp_path, files := pictures())
    numbers = {"ant": "0", "bee": "1.0", "cow": "2"}
    table = write_table(folder / "t.csv", rows(files, label=numbers.get))
    data = load_data(table, P)
    assert data.classes == ["0", "1", "2"]
    assert len(data.notes) == 1  # that it was split
    (folder / "classes.txt").write_text("ant\nbee\ncow\n\n")
    assert_same(load_data(table, P), load_data(write_table(folder / "names.csv", rows(files)), P))
    (folder / "classes.txt").write_text("ant\nbee\ncow\ndog\n")  # a class may be without images
    assert load_data(table, P).classes == ["ant", "bee", "cow", "dog"]
    (folder / "classes.txt").unlink()
    write_table(table, rows(files, label={"ant": "10", "bee": "2", "cow": "7"}.get))
    data = load_data(table, P)
    assert data.classes == ["2", "7", "10"]
    assert data.train.labels[0] == 0
    assert str(data.train.samples[0]).startswith(str(folder / "bee"))
    assert any("3 numbers from 2 to 10: the classes are numbered 0 to 2 in their order" in note for note in data.notes)


def test_missing_files_are_counted_and_named_like_unreadable_ones(tmp_path):
    folder = write_files(tmp_path, files := pictures(each=20))
    (folder / "ant" / "003.png").unlink()
    table = write_table(folder / "t.csv", rows(files))
    data = load_data(table, P)
    assert len(data.train) + len(data.test) == 59
    assert data.notes[0] == (
        "1 of 60 images could not be read and were skipped: ant/003.png (no such file or directory)"
    )
    with pytest.raises(PlanishError, match=r"t\.csv: 1 of 60 images cannot be read, more than the 1%"):
        load_data(table, P, limit_bad=0.01)


def test_bad_tables_get_one_sentence(tmp_path):
    files = write_files(tmp_path, pictures(each=2)) and pictures(each=2)
    good = rows(files)

    def expect(words, text=None, table=None):
        path = tmp_path / "t.csv"
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        else:
            write_table(path, table)
        with pytest.raises(PlanishError, match=words) as caught:
            load_data(path, P)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)

    with pytest.raises(PlanishError, match=r"absent\.csv does not exist"):
        load_data(tmp_path / "absent.csv", P)
    expect("no column path and no column label.*begins nothing", "")
    expect("no column path and no column label.*begins 'path;label'", "path;label\na;b\n")
    expect("no column label.*first line", "path,class\na,b\n")
    expect("the column label twice", "path,label,Label\na,b,c\n")
    expect("lists no images", "path,label\n\n , \n")
    expect("line 3: the label is missing", "path,label\na,b\nc\n")
    expect("line 2: the path is missing", "path,label\n,b\n")
    expect("line 2: the split is missing", "path,label,split\na,b,\n")
    expect("line 2: the split is 'dev', expected one of train", "path,label,split\na,b,dev\n")
    expect("splits are 'test', 'val', and none is called 'train'", "path,label,split\na,b,val\na,b,test\n")
    expect("line 3: the path goes over several lines", 'path,label\n"a\nb",c\n')
    expect("cannot be read as a table in UTF-8: unexpected end", 'path,label\na,b\n"c,d\n')
    expect("cannot be read as a table in UTF-8", "path,label\nä,b\n".encode("utf-16"))
    expect("one class only \\('ant'\\)", table=[row for row in good if row["label"] == "ant"])
    expect("labels 'ant' and 'bee'", table=[*good, {**good[0], "label": "bee"}])
    expect("1 of 7 labels are below 0", table=[*rows(files, label=lambda n: "1"), {"path": "x.png", "label": "-1"}])
    differ = [{**row, "split": "val" if row["label"] == "cow" else "train"} for row in good]
    expect("3 differ: 'ant' only in the training split", table=differ)
    expect("has one image", table=good[:3])
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    expect("1 labels name none of the 2 classes: 'cow'", table=good)
    expect(
        "label 2 names none of the 2 classes", table=[{**row, "label": str(NAMES.index(row["label"]))} for row in good]
    )
    for text, words in (("ant\n\nbee", "an empty line"), ("ant\nbee\nant\n", "the class 'ant' twice"), ("", "empty")):
        (tmp_path / "classes.txt").write_text(text)
        expect(words, table=good)
