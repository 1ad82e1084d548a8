"""Room for what is cached: in memory while it lasts, then on the disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from planish.errors import NotWritten, why_not_written


class Shelf:
    """Room for tensors of one row an image: in memory while it lasts, then in files of a temporary folder.

    Args:
        memory: bytes that may be held in memory at once.
        folder: where the files go; default: the system's temporary folder.
    """

    def __init__(self, memory: float, folder: Path | None = None) -> None:
        self.memory, self.held = memory, 0
        self._folder = tempfile.TemporaryDirectory(prefix="planish-", dir=folder)
        self._files = 0

    def room(self, rows: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of (rows, *shape) with arbitrary values.

        Raises:
            NotWritten: it goes into a file, and the disk has no room for it.
        """
        count = rows * int(torch.Size(shape).numel())
        size = count * dtype.itemsize
        if self.held + size <= self.memory:
            self.held += size
            return torch.empty(rows, *shape, dtype=dtype)
        self._files += 1
        name = str(Path(self._folder.name) / f"{self._files}.bin")
        self._claim(name, size)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(rows, *shape)

    def _claim(self, name: str, size: int) -> None:
        """Make a file whose room on the disk is taken: a mapped file that grows on a full disk kills the process."""
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
                else:
                    os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise NotWritten(
                f"the caches of the calibration images take {size / 1e6:.0f} MB more than fit into memory, and "
                f"{name} could not be written: {why_not_written(error)}, give fewer --calibration-images, more "
                f"--memory, or another folder in the variable TMPDIR"
            ) from error

    def give_back(self, tensor: Tensor) -> None:
        """The tensor is not needed any more."""
        name = tensor.untyped_storage().filename
        if name:
            Path(name).unlink(missing_ok=True)
        else:
            self.held -= tensor.numel() * tensor.element_size()

    def close(self) -> None:
        self._folder.cleanup()
