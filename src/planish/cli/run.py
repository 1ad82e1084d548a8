"""``planish run``."""

from __future__ import annotations

import shlex
from dataclasses import fields

from planish.cli.ended import saying_what_is_kept
from planish.cli.options import Run
from planish.cli.resume import fresh_name, trusting
from planish.recipes.config import RunConfig
from planish.recipes.journey import run
from planish.recipes.processes import on_main
from planish.report.folder import RunFolder


def execute(command: Run) -> None:
    """The whole journey, into a run folder."""
    config = RunConfig(**{item.name: getattr(command, item.name) for item in fields(RunConfig)})
    out = command.out or on_main(lambda: fresh_name(config.models.model))

    def kept() -> str:
        if not RunFolder(out).partial.exists():
            return "nothing was done yet that could be kept"
        again = shlex.join(["planish", "run", "--resume", "--out", str(out), *trusting(command.models.model)])
        return f"what was done is kept, continue with: {again}"

    try:
        with saying_what_is_kept(kept, config.models.batch_size):
            run(config, out, resume=command.resume)
    except KeyboardInterrupt:
        if not RunFolder(out).partial.exists():
            raise KeyboardInterrupt("interrupted before anything was done") from None
        raise KeyboardInterrupt(f"interrupted; {kept()}") from None
