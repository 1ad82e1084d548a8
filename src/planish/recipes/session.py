"""What surrounds long work: threads, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from planish.errors import is_lost_connection, printable
from planish.recipes.processes import is_main, on_main

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def free_cores() -> int:
    """Cores for each process that nothing else keeps busy, as the main process sees it; at least one.

    Two threads of PyTorch on a core and a half are many times slower than one thread.
    """
    return on_main(_free_cores)


def _free_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        busy = os.getloadavg()[0]
    except OSError:
        busy = 0.0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return max(1, min(cores, int(cores - busy + 0.7)) // here)


def say(console: Console, text: str) -> None:
    """A line; long ones are left whole where there is no terminal, so that a log holds one line an event."""
    shown = "\n".join(map(printable, text.split("\n")))
    console.print(shown, markup=False, highlight=False, soft_wrap=not console.is_terminal)


class StopFlag:
    """Set by Ctrl-C or SIGTERM. Within :meth:`gently` the first only sets it; elsewhere it stops at once.

    Args:
        tell: whether the first one is answered with a line.
    """

    def __init__(self, tell: bool = True) -> None:
        self.stopped, self.tell = False, tell
        self._gentle = False

    def __call__(self) -> bool:
        return self.stopped

    def check(self) -> None:
        """Raise KeyboardInterrupt if the flag is set."""
        if self.stopped:
            raise KeyboardInterrupt

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Inside, the work asks the flag and saves its state before it stops; a second signal stops it at once."""
        self._gentle = True
        try:
            yield
        finally:
            self._gentle = False

    def receive(self) -> None:
        """What a signal does."""
        first, self.stopped = not self.stopped, True
        if not (first and self._gentle):
            raise KeyboardInterrupt
        if self.tell:  # not through print: the signal may have come in the middle of one
            os.write(2, b"\nplanish: stopping after this step; once more stops at once\n")


@contextmanager
def stoppable() -> Iterator[StopFlag]:
    """A flag that SIGINT and SIGTERM set, inside; nothing is changed outside the main thread."""
    flag = StopFlag(tell=is_main())
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    owner = os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == owner:  # loader processes inherit the handler; what they do is for this process to say
            flag.receive()

    def unraisable(dropped: Any) -> None:
        if dropped.exc_type is not KeyboardInterrupt:  # that of a signal in a destructor; the flag knows of it
            told(dropped)

    told, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, old in before.items():
        if old is not signal.SIG_IGN:  # in the background of a script, or under nohup
            signal.signal(number, handler)
    try:
        yield flag
    except RuntimeError as error:
        if is_lost_connection(error):
            raise  # the launcher ends the others when one is gone: that is what happened, and not Ctrl-C
        flag.check()  # Ctrl-C reaches the loader's processes, too, and one of them was faster
        raise
    finally:
        sys.unraisablehook = told
        for number, old in before.items():
            signal.signal(number, old)
