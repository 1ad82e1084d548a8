"""The run folder: everything that one command produced, in one place.

While a run goes on, its folder has a temporary name beside the final one (``runs/.NAME.partial``); ``finish`` moves it
into place. So a folder with the final name is always complete, and an interrupted run can be told from a finished one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from planish.errors import PlanishError
from planish.report.files import append_json, drop_torn_line, to_json, write_text, writing
from planish.report.plain import drop_none, flatten_keys, to_plain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class RunFolder:
    """One run on disk. Made by :meth:`open` (a new or resumed run) or :meth:`at` (to read one).

    With ``active=False`` nothing is checked, made or written: of several processes only the main one is active, and
    the others can share the code that logs.
    """

    def __init__(self, out: str | Path, *, active: bool = True) -> None:
        self.final = Path(os.path.abspath(Path(out).expanduser()))
        if not self.final.name:
            raise PlanishError(f"--out {out}: the run needs a folder name of its own, such as runs/first")
        self.partial = self.final.with_name(f".{self.final.name}.partial")
        self.active = active
        self.finished = False
        self.resumed = False

    @classmethod
    def open(cls, out: str | Path, resume: bool = False, *, active: bool = True) -> RunFolder:
        """Start the run ``out``, or continue an interrupted one.

        Raises PlanishError if a finished run is there, if an interrupted one is there and ``resume`` is not set, or
        if ``resume`` is set and nothing is there.
        """
        run = cls(out, active=active)
        run.resumed = resume
        if not active:
            return run
        if os.path.lexists(run.final):
            if not any((run.final / name).is_file() for name in ("config.toml", "results.json")):
                raise PlanishError(f"{out}: what is already there is no run; choose another folder with --out")
            if resume:
                raise PlanishError(f"{out}: this run is finished, there is nothing to resume")
            raise PlanishError(f"{out}: this run is already there; choose another folder with --out, or delete it")
        if resume:
            if not run.partial.is_dir():
                raise PlanishError(f"{out}: there is no interrupted run to resume; leave --resume away to start one")
            drop_torn_line(run.path("log.jsonl"))
            run._drop_unfinished()
            return run
        if os.path.lexists(run.partial):
            raise PlanishError(
                f"{out}: an interrupted run is there; --resume continues it, "
                f"or delete {run.partial} to start over (or choose another --out)"
            )
        with writing(run.partial):
            run.partial.mkdir(parents=True)
        return run

    @classmethod
    def at(cls, out: str | Path) -> RunFolder:
        """An existing run to read: the finished one, else the interrupted one. Raises PlanishError if neither is."""
        run = cls(out)
        run.finished = run.final.is_dir()
        if not run.folder.is_dir():
            raise PlanishError(f"{out}: there is no run here; expected a folder with results.json in it")
        return run

    @property
    def folder(self) -> Path:
        """Where the files are now: the temporary folder until ``finish``, the final one after it."""
        return self.final if self.finished else self.partial

    def path(self, name: str) -> Path:
        """The place of the file ``name`` in this run, as of now."""
        return self.folder / name

    def write_config(self, config: Mapping[str, Any], *, may_differ: Collection[str] = ("resume", "out")) -> None:
        """Write the resolved configuration to config.toml; None values are left out.

        If the run was resumed, the configuration must be the one that the run began with, except for the dotted keys
        in ``may_differ``; otherwise PlanishError names the first settings that differ.
        """
        if not self.active:
            return
        try:
            text = tomli_w.dumps(drop_none(to_plain(config)))
        except TypeError as error:
            raise PlanishError(f"config.toml: a setting cannot be written as TOML ({error})") from None
        if self.resumed and self.path("config.toml").exists():
            self._check_same_config(text, may_differ)
        write_text(self.path("config.toml"), text)

    def read_config(self) -> dict[str, Any]:
        """The settings in config.toml; empty if none were written yet."""
        try:
            return tomllib.loads(self.path("config.toml").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise PlanishError(
                f"{self.path('config.toml')}: not readable ({error}); delete the run to start over"
            ) from None

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one event to log.jsonl as one JSON object on one line, on disk when this returns; NaN as null."""
        if not self.active:
            return
        append_json(self.path("log.jsonl"), event)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json in one piece. Numbers that are None are left out of the rows."""
        if not self.active:
            return
        plain = to_plain(results)
        if isinstance(plain.get("rows"), list):
            kept = [{k: v for k, v in row.items() if v is not None} for row in results["rows"]]
            plain["rows"] = to_plain(kept)  # a NaN that was measured stays, as null
        write_text(self.path("results.json"), to_json(plain, indent=2) + "\n")

    def read_results(self) -> dict[str, Any]:
        """The content of results.json. Raises PlanishError if it is missing or is no results file."""
        path = self.path("results.json")
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if path.parent == self.final and not self.path("config.toml").is_file():
                raise PlanishError(f"{path.parent} is no folder of a run: it holds no results.json") from None
            raise PlanishError(f"{path}: no results were written in this run yet") from None
        except (ValueError, OSError) as error:
            raise PlanishError(f"{path}: not a readable results file ({error})") from None
        if not isinstance(results, dict) or not isinstance(results.get("rows"), list):
            raise PlanishError(f'{path}: not a results file of planish; expected a JSON object with a list of "rows"')
        return results

    def finish(self) -> Path:
        """Move the run to its final name, and return it."""
        if self.active and not self.finished:
            with writing(self.final):
                os.rename(self.partial, self.final)
        self.finished = True
        return self.final

    def _check_same_config(self, text: str, may_differ: Collection[str]) -> None:
        path = self.path("config.toml")
        try:
            before = flatten_keys(tomllib.loads(path.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            raise PlanishError(f"{path}: cannot read the settings of the interrupted run ({error})") from None
        now = flatten_keys(tomllib.loads(text))
        keys = [k for k in (now | before) if now.get(k) != before.get(k) and k not in may_differ]
        if keys:
            shown = "; ".join(f"{k} was {before.get(k, 'unset')!s}, is {now.get(k, 'unset')!s}" for k in keys[:3])
            more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise PlanishError(
                f"{self.final}: cannot resume with other settings ({shown}{more}); use those it began with, "
                f"or choose another --out"
            )

    def _drop_unfinished(self) -> None:
        """Delete files that a killed process was about to move into place."""
        for pattern in (".*.tmp", ".*.new"):
            for path in self.partial.glob(pattern):
                if path.is_file():
                    path.unlink(missing_ok=True)
