"""Where a command may write its file."""

from __future__ import annotations

import os
from pathlib import Path

from planish.errors import PlanishError
from planish.recipes.processes import on_main


def check_target(path: Path, overwrite: bool) -> None:
    """Raise PlanishError, before anything long begins, if a file cannot be written to ``path`` or is already there."""
    on_main(lambda: check_file(path, overwrite))


def check_beside(out: Path, beside: Path, what: str, overwrite: bool, going_on: bool) -> None:
    """The same for a second file that a command writes beside ``out``; one that is going on may have written it."""
    if beside == out:
        raise PlanishError(f"--out {out} is where {what} goes: give another name, such as {out.stem}.safetensors")
    if on_main(lambda: beside.is_dir() or (beside.exists() and not overwrite and not going_on)):
        raise PlanishError(
            f"--out {out}: {what} goes into {beside}, which is already there; give another name"
            + ("" if beside.is_dir() else ", or --overwrite to replace it")
        )


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
