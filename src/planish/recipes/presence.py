"""Several processes at one run: each says that it lives, so that all end soon, and say why, when one of them is gone.

A process that was killed leaves the others in a collective operation: with gloo they fail at once, with NCCL they wait
for many minutes, and neither says who is missing. Here a thread of each process counts up a number in the store at
which the processes met (``MASTER_ADDR:MASTER_PORT``), and reads those of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from planish.errors import PlanishError, is_lost_connection

BEAT = 1.0  # seconds between two signs of life
SILENCE = 120.0  # without a sign for so long, a process is gone, whatever the others feel
AFTER_FAILURE = 10.0  # the same, when a collective operation has failed
STARTING = 600.0  # for a process that has given none yet
ENDED = 2  # exit status


@dataclass
class Roll:
    """What is known of the others; pure bookkeeping, with the time given.

    Args:
        others: their ranks.
        began: when the watch began, in seconds of any clock.
    """

    others: list[int]
    began: float
    seen: dict[int, tuple[str, float]] = field(default_factory=dict)  # the last sign of each, and when it changed

    def note(self, rank: int, sign: str, now: float) -> None:
        """A process has given a sign: a number that grows, ``done`` or ``failed``."""
        if self.seen.get(rank, ("", 0.0))[0] != sign:
            self.seen[rank] = sign, now

    def missing(self, now: float, silence: float) -> list[tuple[int, str]]:
        """Those that are gone, each with what became of it."""
        found = []
        for rank in self.others:
            sign, since = self.seen.get(rank, ("", self.began))
            if sign == "failed":
                if now - since > AFTER_FAILURE:  # the same error may be about to end this process, too
                    found.append((rank, "has ended with an error"))
            elif sign != "done" and now - since > (silence if sign else max(silence, STARTING)):
                found.append((rank, f"is gone: no sign of life for {now - since:.0f} s"))
        return found


class Presence:
    """The thread that tells the others that this process lives, and watches them.

    Args:
        rank, size: of this process, and how many there are.
        connect: gives the store; called in the thread, because it waits until the store is there.
        lost: called with a sentence, once, when a process is gone and this one has not noticed for ``SILENCE``.
    """

    def __init__(self, rank: int, size: int, connect: Callable[[], Any], lost: Callable[[str], None]) -> None:
        self.rank, self.size, self.connect, self.lost = rank, size, connect, lost
        self.roll = Roll([other for other in range(size) if other != rank], time.monotonic())
        self.store_gone: float | None = None
        self._over, self._asked = threading.Event(), threading.Event()
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, daemon=True, name="presence")

    def start(self) -> None:
        self._thread.start()

    def end(self, sign: str) -> None:
        """Say ``done`` or ``failed`` to the others, and stop."""
        self._over.set()
        self._thread.join(timeout=0 if self._store is None else 2 * BEAT)  # it may still wait for the store
        if self._store is not None and self.store_gone is None and not self._thread.is_alive():
            try:
                self._store.set(f"{self.rank}", sign)
            except Exception:  # the one that holds the store has ended first
                self.store_gone = time.monotonic()

    def explain(self, patience: float = AFTER_FAILURE + 5) -> str | None:
        """After a collective operation has failed: who is missing; waits until that is known, or for ``patience``."""
        self._asked.set()  # the main thread knows that something is wrong, and will end this process itself
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if text := self._sentence(AFTER_FAILURE):
                return text
            time.sleep(BEAT / 4)
        return None

    def _sentence(self, silence: float) -> str | None:
        now = time.monotonic()
        gone = self.roll.missing(now, silence)
        if gone:
            rank, fate = gone[0]
            more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
            return f"process {rank} of {self.size}{more} {fate}"
        if self.store_gone is not None and now - self.store_gone > min(silence, AFTER_FAILURE):
            return f"process 0 of {self.size} is gone, or whatever else the processes met at"
        return None

    def _watch(self) -> None:
        try:
            self._store = self.connect()
        except Exception:  # it never came up; whoever started the processes says so
            return
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            if self.store_gone is None:
                try:
                    self._exchange(str(count))
                except Exception:  # nothing can be learned from it any more
                    self.store_gone = time.monotonic()
            if not self._asked.is_set() and (text := self._sentence(SILENCE)):
                self.lost(text)
                return

    def _exchange(self, sign: str) -> None:
        self._store.set(f"{self.rank}", sign)
        for other in self.roll.others:
            if self._store.check([f"{other}"]):
                self.roll.note(other, self._store.get(f"{other}").decode(), time.monotonic())


_PRESENT: list[Presence] = []  # the watch of this process, if there is one


@contextmanager
def present() -> Iterator[None]:
    """Inside, this process watches the others; nothing happens where it is alone.

    Raises:
        PlanishError: a collective operation has failed because a process is gone; says which.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _PRESENT or "MASTER_ADDR" not in os.environ:
        yield
        return
    watch = Presence(int(os.environ.get("RANK", "0")), size, _store, _end_now)
    _PRESENT.append(watch)
    watch.start()
    sign = "failed"
    try:
        yield
        sign = "done"
    except RuntimeError as error:
        if not is_lost_connection(error) or (text := watch.explain()) is None:
            raise
        raise PlanishError(f"{text}; {KEPT}") from error
    except KeyboardInterrupt:
        sign = "done"  # all were told to stop
        raise
    finally:
        watch.end(sign)
        _PRESENT.clear()


KEPT = "this process stops, too; what was saved is whole: start all processes again to continue (a run with --resume)"


def _store() -> Any:
    from torch.distributed import PrefixStore, TCPStore

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=STARTING), wait_for_workers=False)
    # of a run that its launcher has started again, the signs of the first start mean nothing
    return PrefixStore(f"planish/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _end_now(text: str) -> None:
    """End this process whatever it waits for; its files are whole at any moment."""
    os.write(2, f"planish (process {os.environ.get('RANK', '0')}): {text}; {KEPT}\n".encode())
    os._exit(ENDED)
