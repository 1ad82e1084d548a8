"""How far long work is, and how long it will still take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from planish.recipes.session import say

QUIET = 30.0  # seconds without a line after which one is printed where there is no terminal


class Work:
    """The stages of a run, with the remaining time; one bar in a terminal, plain lines elsewhere.

    Args:
        plan: the kind and the guessed cost of each stage, in order. As soon as a stage of a kind has run, the
            remaining ones of its kind are estimated from it; before that from what a unit of cost took so far.
    """

    def __init__(self, plan: Sequence[tuple[str, float]], console: Console) -> None:
        self.plan, self.console = list(plan), console
        self._index, self._share, self._text = -1, 0.0, ""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._cost: defaultdict[str, float] = defaultdict(float)
        self._began = self._stage_began = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        self._task: Any = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                TextColumn("{task.fields[left]}"),
                console=console, transient=True, refresh_per_second=2,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=1.0, left="")

    def __enter__(self) -> Work:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def begin(self, description: str) -> None:
        """The next stage begins."""
        self._index += 1
        self._share, self._text, self._stage_began = 0.0, description, time.perf_counter()
        if self._bar:
            self._bar.update(self._task, description=description)
            self._show()
        else:
            self._line(description)

    def at(self, share: float) -> None:
        """This share of the current stage is done."""
        self._share = min(share, 1.0)
        if self._bar:
            self._show()
        elif time.perf_counter() - self._last_line > QUIET:
            self._line(f"{self._text}, {100 * self._share:.0f} %")

    def end(self, measured: bool = True) -> None:
        """The current stage is done; ``measured=False`` if it was not really worked on, as after --resume."""
        kind, cost = self.plan[self._index]
        if measured:
            self._seconds[kind] += time.perf_counter() - self._stage_began
            self._cost[kind] += cost
        self._share = 1.0
        self._stage_began = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    def left(self) -> float | None:
        """Seconds still to go; ``None`` while there is nothing to tell it from."""
        seconds, cost = dict(self._seconds), dict(self._cost)
        kind, whole = self.plan[max(self._index, 0)]
        if 0 < self._share < 1:
            seconds[kind] = seconds.get(kind, 0.0) + time.perf_counter() - self._stage_began
            cost[kind] = cost.get(kind, 0.0) + self._share * whole
        if not sum(cost.values()):
            return None
        overall = sum(seconds.values()) / sum(cost.values())
        rates = {kind: seconds[kind] / cost[kind] for kind in cost if cost[kind]}
        remaining = [(kind, (1 - self._share) * whole), *self.plan[self._index + 1 :]]
        return sum(cost * rates.get(kind, overall) for kind, cost in remaining)

    def _show(self) -> None:
        assert self._bar is not None
        left = self.left()
        if left is not None:
            share = self.elapsed / max(self.elapsed + left, 1e-9)
            self._bar.update(self._task, completed=share, left=f"{duration(left)} left")

    def _line(self, text: str) -> None:
        left = self.left()
        hint = "" if left is None else f", about {duration(left)} left"
        say(self.console, f"[{duration(self.elapsed)}{hint}] {text}")
        self._last_line = time.perf_counter()


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
