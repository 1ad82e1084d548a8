"""What a training keeps beside the file that it will write, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planish.errors import PlanishError
from planish.recipes.processes import is_main, on_main
from planish.report.files import write_text, writing

_SETTINGS = "settings.json"


class Kept:
    """The folder ``OUT.checkpoint``: the settings of the training and its state.

    Of several processes, the main one reads, writes and deletes, and all are told the same.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + ".checkpoint")
        self.state = self.folder / "state"
        self.last_good = out.with_name(f"{out.stem}-last-good{out.suffix}")

    def before(self) -> dict[str, Any]:
        """The settings of an interrupted training; empty if there is none."""
        return on_main(self._read)

    def _read(self) -> dict[str, Any]:
        if not self.folder.exists():
            return {}
        try:
            values = json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))
            return values if isinstance(values, dict) else {}
        except (OSError, ValueError):
            if not self.state.exists():
                return {}
            raise PlanishError(
                f"{self.folder} holds a checkpoint but not its settings: delete it, or choose another --out"
            ) from None

    def begin(self, now: dict[str, Any]) -> None:
        """Write the settings; raises :class:`PlanishError` if a training with other ones was interrupted here."""
        on_main(lambda: self._begin(json.loads(json.dumps(now))))

    def _begin(self, now: dict[str, Any]) -> None:
        before = self._read()
        differing = [key for key in (now | before) if now.get(key) != before.get(key)] if before else []
        if differing:
            shown = "; ".join(
                f"{key} was {before.get(key, 'unset')}, is {now.get(key, 'unset')}" for key in differing[:3]
            )
            raise PlanishError(
                f"{self.folder} holds an interrupted training with other settings ({shown}): give the same ones to "
                f"continue it, delete it to start over, or choose another --out"
            )
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_text(self.folder / _SETTINGS, json.dumps(now, indent=2))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, an interruption says what is kept, and a failure before anything was done keeps nothing."""
        try:
            yield
        except PlanishError:
            if not self.holds_state():
                self.drop()  # the next command has other settings, and is to begin
            raise
        except KeyboardInterrupt:
            if not is_main():
                raise
            if not self.holds_state():
                self.drop()
                raise KeyboardInterrupt("interrupted before the first epoch was done; nothing is kept") from None
            raise KeyboardInterrupt(
                f"interrupted; the state is kept in {self.folder}, the same command continues it"
            ) from None

    def holds_state(self) -> bool:
        """Whether there is more than the settings, so that a training can go on."""
        return self.folder.is_dir() and any(path.name != _SETTINGS for path in self.folder.iterdir())

    def drop(self) -> None:
        """The file is written: nothing has to be kept any more."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
