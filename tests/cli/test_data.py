"""``--data`` with other sources than class folders: the same numbers, notes, and exit status 2 for bad ones."""

from __future__ import annotations

from tests.data.pictures import write_table, write_tar


def given(options: list[str], data: object) -> list[str]:
    """The options with other data."""
    place = options.index("--data") + 1
    return [*options[:place], str(data), *options[place + 1 :]]


def test_a_table_and_tar_shards_give_the_numbers_of_the_folder(tiny, shared, tmp_path, planish):
    files = sorted((shared / "data").rglob("*.png"), key=str)
    rows = [{"path": str(path), "label": path.parent.name} for path in files]
    table = write_table(tmp_path / "images.csv", rows)
    members = {}
    for path in files:
        name = f"{path.parent.name}/{path.stem}"
        members |= {f"{name}.png": path.read_bytes(), f"{name}.json": b'{"label": "%s"}' % path.parent.name.encode()}
    write_tar(tmp_path / "images-00.tar", members)
    expected = planish("evaluate", *tiny)
    assert expected.status == 0, expected.err
    numbers = [line for line in expected.out.splitlines() if not line.startswith("note: ")]
    for source in (table, tmp_path / "images-{00..00}.tar"):
        ended = planish("evaluate", *given(tiny, source))
        assert ended.status == 0, ended.err
        assert [line for line in ended.out.splitlines() if not line.startswith("note: ")] == numbers
        assert "20 % of each class were set aside" in " ".join(ended.out.split())


def test_a_run_keeps_its_source_for_resume(tiny, shared, tmp_path, planish):
    rows = [{"path": str(path), "label": path.parent.name} for path in sorted((shared / "data").rglob("*.png"))]
    table = write_table(
        tmp_path / "images.csv", [{**row, "split": split} for row in rows for split in ("train", "val")]
    )
    ended = planish(
        "run", *given(tiny, table), "--arms", "given", "--methods", "rtn", "--schemes", "w4a4", "--out", "r"
    )
    assert ended.status == 0, ended.err
    assert "note: 60 of 60 test images are also training images, byte for byte" in ended.out
    assert f'data = "{table}"' in (tmp_path / "r" / "config.toml").read_text()


def test_bad_sources_are_one_sentence(tiny, tmp_path, planish):
    (tmp_path / "t.csv").write_text("file,label\n")
    (tmp_path / "t.tar.gz").write_bytes(b"\x1f\x8b")
    for source, words in (("t.csv", "has no column path"), ("t.tar.gz", "is compressed"), ("hf:", "names no data set")):
        ended = planish("evaluate", *given(tiny, source))
        assert ended.status == 2
        assert words in " ".join(ended.err.split())
