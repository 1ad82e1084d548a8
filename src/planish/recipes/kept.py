"""What long work keeps beside the file that it will write, so that an interrupted one goes on where it was."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from planish.errors import PlanishError
from planish.recipes.config import FREE
from planish.recipes.processes import is_main, on_main
from planish.recipes.session import say
from planish.recipes.tracking import Tracking
from planish.report.files import append_json, drop_torn_line, write_text, writing

_SETTINGS, _LOG = "settings.json", "log.jsonl"


def log_beside(out: Path) -> Path:
    """Where the log of a command goes that writes ``out``."""
    return out.with_suffix(".jsonl")


class Kept:
    """The folder ``OUT.checkpoint``: the settings of long work, its state, and its log.

    Of several processes, the main one reads, writes and deletes, and all are told the same.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + ".checkpoint")
        self.state = self.folder / "state"
        self.last_good = out.with_name(f"{out.stem}-last-good{out.suffix}")
        self.out = out

    def before(self) -> dict[str, Any]:
        """The settings of interrupted work; empty if there is none."""
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
        """Write the settings; raises :class:`PlanishError` if work with other ones was interrupted here.

        Where the result goes, and what no result depends on, may differ.
        """
        settings = {key: value for key, value in now.items() if key not in ("out", "overwrite", *FREE)}
        on_main(lambda: self._begin(json.loads(json.dumps(settings))))

    def _begin(self, now: dict[str, Any]) -> None:
        before = self._read()
        differing = [key for key in (now | before) if now.get(key) != before.get(key)] if before else []
        if differing:
            shown = "; ".join(
                f"{key} was {before.get(key, 'unset')}, is {now.get(key, 'unset')}" for key in differing[:3]
            )
            raise PlanishError(
                f"{self.folder} holds interrupted work with other settings ({shown}): give the same ones to "
                f"continue it, delete it to start over, or choose another --out"
            )
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_text(self.folder / _SETTINGS, json.dumps(now, indent=2))
        for left in self.out.parent.glob(f".{glob.escape(self.out.name)}.*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
        if not before:
            write_text(self.log_file, "")
        elif not self.log_file.exists() and log_beside(self.out).exists():  # it was killed in its last moments
            with writing(self.log_file):
                os.replace(log_beside(self.out), self.log_file)
        drop_torn_line(self.log_file)

    @property
    def log_file(self) -> Path:
        """Where events go while the work goes on, one JSON object a line."""
        return self.folder / _LOG

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event to the log."""
        if is_main():
            append_json(self.log_file, event)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, an interruption says what is kept, and a failure before anything was done keeps nothing."""
        try:
            yield
        except Exception:
            if is_main() and not self.holds_state():
                self.drop()  # the next command has other settings, and is to begin
            raise
        except KeyboardInterrupt:
            if not is_main():
                raise
            if not self.holds_state():
                self.drop()
                raise KeyboardInterrupt("interrupted before there was anything to keep") from None
            raise KeyboardInterrupt(f"interrupted; {self.describe()}") from None

    def describe(self) -> str:
        """What is kept, and how to go on, for the end of a sentence."""
        if not self.holds_state():
            return "nothing was done yet that could be kept"
        return f"the state is kept in {self.folder}, the same command continues it (delete it to start over)"

    def holds_state(self) -> bool:
        """Whether there is more than settings and a log, so that the work can go on."""
        if not self.folder.is_dir():
            return False
        return any(path.is_file() and path.name not in (_SETTINGS, _LOG) for path in self.folder.rglob("*"))

    @contextmanager
    def tracked(
        self, trackers: tuple[str, ...], settings: Mapping[str, Any], console: Console
    ) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Inside, the function that is given takes events for the log and the trackers, in ``OUT-tracking``."""
        place = self.out.with_name(f"{self.out.stem}-tracking")
        with Tracking(trackers, place, self.out.stem, settings, lambda text: say(console, text)) as tracking:

            def tell(event: Mapping[str, Any]) -> None:
                self.log(event)
                tracking(event)

            yield tell

    def finish_log(self) -> None:
        """Put the log beside the file that is written, under its name."""
        if is_main() and self.log_file.exists():
            with writing(log_beside(self.out)):
                os.replace(self.log_file, log_beside(self.out))

    def drop(self) -> None:
        """The file is written: nothing has to be kept any more."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
