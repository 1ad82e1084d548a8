"""Room for caches: in memory, then in files, and a sentence where the disk has none."""

import errno
import os
from pathlib import Path

import pytest
import torch

from planish.errors import NotWritten
from planish.ptq.shelf import Shelf


def test_memory_first_then_files(tmp_path):
    shelf = Shelf(4 * 30, tmp_path)
    held, filed = shelf.room(5, (2, 3)), shelf.room(4, (3,))
    assert (held.untyped_storage().filename, filed.shape) == (None, (4, 3))
    (file,) = tmp_path.glob("*/*.bin")
    assert file.stat().st_size == 4 * 12
    filed[:] = torch.arange(12.0).view(4, 3)
    assert filed.sum() == 66
    shelf.give_back(filed)
    assert not file.exists()
    shelf.give_back(held)
    assert shelf.held == 0
    shelf.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken here")
def test_the_room_is_taken_before_it_is_used(tmp_path):
    """A hole in a mapped file that cannot be filled later kills the process without a word."""
    shelf = Shelf(0, tmp_path)
    shelf.room(1 << 18, (1,))
    (file,) = tmp_path.glob("*/*.bin")
    assert 512 * file.stat().st_blocks >= file.stat().st_size == 1 << 20
    shelf.close()


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate" if hasattr(os, "posix_fallocate") else "ftruncate", full)
    shelf = Shelf(0, tmp_path)
    with pytest.raises(NotWritten, match=r"take 4 MB more .* the disk is full: make room, .*--memory.*TMPDIR"):
        shelf.room(1000, (1000,))
    shelf.close()


def test_a_really_full_disk(tmp_path):
    place = Path("/dev/shm")
    if not place.is_dir():
        pytest.skip("needs /dev/shm")
    shelf = Shelf(0, place)
    try:
        with pytest.raises(NotWritten, match="the disk is full"):
            shelf.room(1 << 40, (1 << 8,))
    finally:
        shelf.close()
