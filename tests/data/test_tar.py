"""Tar files that were made to do harm: names that lead elsewhere, sizes that cannot be, links; nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile

import pytest

from planish.data import load_data
from planish.data.tar import index_tar
from planish.errors import PlanishError
from planish.models import Preprocessing
from tests.data.pictures import encoded, write_tar

P = Preprocessing((3, 8, 8), crop_pct=1.0)


def header(kind: bytes, size: int, name: str = "a.png") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [2**33, 10**18, 2**63 + 5])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_promises_more_than_there_is(tmp_path, kind, size):
    (tmp_path / "t.tar").write_bytes(header(kind, size) + bytes(2048))
    with pytest.raises(PlanishError, match=r"t\.tar (cannot be read as an uncompressed tar file|is cut off)") as caught:
        index_tar(tmp_path / "t.tar")
    assert "\n" not in str(caught.value)


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    place = tmp_path / "in" / "here"
    names = ["../../escaped", "/absolute", "a/../../b", "C:\\windows", "..", "x\x1b]0;owned\x07y", "two\nlines"]
    members = {}
    for i, name in enumerate(names * 2):
        members[f"{i % 2}{name}.png" if name != ".." else f"{i % 2}/../c{i}.png"] = encoded(i)
    labels = {name.rpartition(".png")[0] + ".cls": str(i % 2).encode() for i, name in enumerate(members)}
    shard = write_tar(place / "t.tar", {**members, **labels})
    before = sorted(os.walk(tmp_path))
    data = load_data(shard, P)
    assert len(data.train) + len(data.test) == len(members)
    assert sorted(os.walk(tmp_path)) == before
    assert not os.path.exists("/absolute.png")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["a.png", "a.cls", "a.json"])
def test_links_and_devices_are_not_followed(tmp_path, kind, name):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
        for i, (other, data) in enumerate(
            {"b.png": encoded(1), "b.cls": b"0", "c.png": encoded(2), "c.cls": b"1"}.items()
        ):
            info = tarfile.TarInfo(other)
            info.size, info.mtime = len(data), i
            tar.addfile(info, io.BytesIO(data))
    if name == "a.json":  # a file with no label in it
        with pytest.raises(PlanishError, match="holds no label"):
            index_tar(tmp_path / "t.tar")
        return
    with pytest.raises(PlanishError, match="a link or with holes" if name == "a.png" else "holds no label"):
        index_tar(tmp_path / "t.tar")


def test_a_shard_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(PlanishError, match=r"pipe\.tar|do not exist"):
        load_data(tmp_path / "pipe.tar", P)
    with pytest.raises(PlanishError, match="no regular file"):
        index_tar(tmp_path / "pipe.tar")
