"""The file around a checkpoint: what safetensors itself reads, and what is refused before any tensor is read."""

from __future__ import annotations

import io
import json

import pytest
import torch
from safetensors import safe_open

from planish.deploy.packed.container import (
    HEADER_LIMIT,
    KEY,
    names_itself,
    parse_json,
    read_data,
    read_table,
    refusing,
    tensor_at,
    to_bytes,
)
from planish.errors import PlanishError

TENSORS = {
    "a": torch.randn(3, 4), "b.c": torch.arange(5, dtype=torch.uint8), "d": torch.tensor(7), "e": torch.empty(0, 3),
    "f": torch.randn(2).to(torch.bfloat16), "g": torch.tensor([True, False, True]),
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(to_bytes(TENSORS, '{"version":1}'))
    return tmp_path / "c.safetensors"


def read(path):
    with refusing(path), path.open("rb") as file:
        table = read_table(file)
        return table, read_data(file, table)


def split(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path, header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_tensors_come_back_and_safetensors_reads_the_same(path):
    table, data = read(path)
    with safe_open(path, framework="pt") as archive:
        for name, tensor in TENSORS.items():
            mine = tensor_at(data, table.entries[name])
            assert mine.dtype == archive.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(mine, tensor)
            assert torch.equal(archive.get_tensor(name), tensor)
        assert archive.metadata() == table.metadata


def test_every_flipped_bit_of_the_tensors_is_noticed(path):
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(PlanishError, match="altered or damaged"):
            read(path)


def test_every_shorter_file_is_refused(path):
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 20, *range(len(content) - 70, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(PlanishError, match=r"c\.safetensors (is incomplete|is no safetensors)"):
            read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["a"].update(dtype="F8_E4M3"), "dtype 'F8_E4M3'"),
        (lambda h: h["a"].update(dtype=3), "dtype 3"),
        (lambda h: h["a"].update(shape=[4, 4]), "size of the tensor 'a'"),
        (lambda h: h["a"].update(shape=[2**47, 2**47]), "size of the tensor 'a'"),
        (lambda h: h["a"].update(shape=[-3, -4]), "no sound shape"),
        (lambda h: h["a"].update(shape="34"), "no sound shape"),
        (lambda h: h["a"].update(shape=[True, 12]), "no sound shape"),
        (lambda h: h["a"].update(data_offsets=[0, 2**60]), "no sound shape"),
        (lambda h: h["a"].update(data_offsets=[0]), "no sound shape"),
        (lambda h: h["a"].update(more=1), "no dtype, shape and data_offsets"),
        (lambda h: h.update(a=[]), "no dtype, shape and data_offsets"),
        (lambda h: h.pop("d"), "begins at byte"),
        (lambda h: h.update(z=h["a"]), "begins at byte"),
        (lambda h: h.update(__metadata__={"x": 1}), "no texts by name"),
        (lambda h: h["__metadata__"].update({KEY: "{}"}), "altered or damaged"),
        (lambda h: h["a"].update(shape=[12]), "altered or damaged"),
    ],
)
def test_headers_that_are_not_sound(path, change, words):
    header, data = split(path)
    change(header)
    write(path, header, data)
    with pytest.raises(PlanishError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a":{},"a":{}}', "occurs twice"),
        (b"{" + b"[" * 200_000, "cannot be read"),
        (b'{"a":' * 100_000, "cannot be read"),
        (b'{"\xff":1}', "cannot be read"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":[' + b"1," * 300_000 + b"1]}", "more than 250000 values"),
        (b'{"a":' + b"1" * 5000 + b"}", "cannot be read"),
        (b'{"\\ud800":1}', "no dtype, shape and data_offsets"),
    ],
)
def test_json_that_is_none(path, header, words):
    write(path, header, b"")
    with pytest.raises(PlanishError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_header_beyond_all_sizes_is_not_read(path):
    for length in (HEADER_LIMIT + 1, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b'{"a":1}')
        with pytest.raises(PlanishError, match="its header would have"):
            read(path)
    with pytest.raises(PlanishError, match="more than"):
        parse_json(" " * (HEADER_LIMIT + 1))


def test_torch_files_are_refused_unread(tmp_path):
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(PlanishError, match=r"m\.pt is a torch file \(pickle\)"):
            read(tmp_path / "m.pt")


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(PlanishError, match="cannot be read: "):
            read(path)


def test_a_checkpoint_names_itself():
    assert names_itself(io.BytesIO(to_bytes({}, "{}")))
    assert not names_itself(io.BytesIO(to_bytes({}, "{}")[:8]))
    assert not names_itself(io.BytesIO(b""))
