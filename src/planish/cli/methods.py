"""``planish methods``."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from planish.cli.options import Methods
from planish.errors import PlanishError
from planish.flattening.activation_noise import KINDS as ACTIVATION_KINDS
from planish.flattening.weight_noise import KINDS as WEIGHT_KINDS
from planish.ptq import METHODS
from planish.qat import METHODS as TRAINING
from planish.qat import get_method
from planish.qat.options import option_docs
from planish.recipes.arms import ARMS


def execute(command: Methods) -> None:
    """Print every method, arm and kind of noise: its name, one sentence, and where it comes from."""
    if command.name:
        _options(command.name)
        return
    groups: dict[str, list[tuple[str, str, str]]] = {
        "quantization methods (--methods, --method)": [(m.name, m.summary, m.paper) for m in METHODS.values()],
        "training methods (--method of planish train)": [(m.name, m.summary, m.paper) for m in TRAINING.values()],
        "arms (--arms)": [(arm.name, arm.summary, arm.paper) for arm in ARMS.values()],
        "weight noise of the flat arm (--weight-noise)": [(k, text, "") for k, text in WEIGHT_KINDS.items()],
        "activation noise of the flat arm (--activation-noise)": [
            (k, text, "") for k, text in ACTIVATION_KINDS.items()
        ],
    }
    _print(groups)


def _options(name: str) -> None:
    if name in METHODS:
        passes = [(step.name, "", "") if not is_dataclass(step) else (step.name, _values(step), "")
                  for step in METHODS[name].passes()]  # fmt: skip
        _print({f"{name}: {METHODS[name].summary} [{METHODS[name].paper}]; its passes:": passes})
        return
    if name not in TRAINING:
        raise PlanishError(f"method {name!r} is not known: choose one of {', '.join([*METHODS, *TRAINING])}")
    method = get_method(name)
    documented = option_docs(type(method))
    entries = [(f"{f.name}={getattr(method, f.name)}", documented.get(f.name, ""), "") for f in fields(method)]
    groups = {f"{method.name}: {method.summary} [{method.paper}]": entries}
    if method.recipes:
        heading = "what its authors trained with, as options of planish train"
        groups[heading] = [
            (network, recipe.command_line, f"not in it: {recipe.besides}" if recipe.besides else "")
            for network, recipe in method.recipes.items()
        ]
    _print(groups)


def _values(step: Any) -> str:
    """The options of a pass, as they would be written in Python."""
    return ", ".join(f"{f.name}={getattr(step, f.name)!r}" for f in fields(step))


def _print(groups: dict[str, list[tuple[str, str, str]]]) -> None:
    names = max((len(name) for entries in groups.values() for name, _, _ in entries), default=0)
    width = max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 0
    for i, (heading, entries) in enumerate(groups.items()):
        print(("\n" if i else "") + heading)
        for name, summary, paper in entries:
            print(_entry(name.ljust(names), summary + (f" [{paper}]" if paper else ""), width))


def _entry(name: str, text: str, width: int) -> str:
    """One line; in a terminal wrapped under the text."""
    line = f"  {name}  {text}"
    return textwrap.fill(line, width, subsequent_indent=" " * (len(name) + 4)) if width else line
