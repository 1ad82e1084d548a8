"""Where a command may write its file."""

from __future__ import annotations

import os
from pathlib import Path

from planish.errors import PlanishError
from planish.recipes.processes import on_main


def check_target(path: Path, overwrite: bool) -> None:
    """Raise PlanishError, before anything long begins, if a file cannot be written to ``path`` or is already there."""
    on_main(lambda: check_file(path, overwrite))


def check_file(path: Path, overwrite: bool) -> None:
    """The same, asked by a command that is one process."""
    folder = path.parent
    if not folder.is_dir():
        raise PlanishError(f"--out {path}: the folder {folder} does not exist; make it first")
    if path.is_dir():
        raise PlanishError(f"--out {path} is a folder: give the name of a file")
    if not os.access(folder, os.W_OK):
        raise PlanishError(f"--out {path}: the folder {folder} cannot be written to")
    if path.exists() and not overwrite:
        raise PlanishError(f"--out {path} is already there: give another name, or --overwrite to replace it")
