"""Several forward passes side by side, each halted at the same places.

A pass that goes through a network layer by layer needs the inputs of a layer for all calibration images, with all
earlier layers already quantized. Running the network once for every layer costs the square of its depth; caching the
outputs of blocks needs to know where the network can be cut. Here every batch has a forward pass of its own, which is
halted at each layer until all batches have come there and the layer has been decided. So each image goes through the
network once, whatever its connections are, and what is held is what is alive at that point.

One thread belongs to each forward pass, but only one of them runs at any time, in the order of the batches: nothing
depends on the system's scheduling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from planish.errors import PlanishError
from planish.network.taps import stepped_out

Halt = Callable[[str, Any], None]  # called inside a run: (name of the place, what the decision is made from)


class _Abandoned(BaseException):
    """The other runs will not go on; no ``Exception``, so that no model takes it for its own."""


class _Runner:
    """One run in its thread, which waits except while :meth:`step` is being executed."""

    def __init__(self, run: Callable[[Halt], None]) -> None:
        self.place: str | None = None  # None: the run has ended
        self.payload: Any = None
        self.error: BaseException | None = None
        self._run, self._abandoned = run, False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Go on until the next place or the end."""
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        self._abandoned = True
        self._go.release()
        self._thread.join()

    def _main(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():
                    self._run(self._halt)
        except _Abandoned:
            pass
        except BaseException as error:  # raised again by step, in the thread of the caller
            self.error = error
        self.place, self.payload = None, None
        self._back.release()

    def _halt(self, place: str, payload: Any) -> None:
        if self._abandoned:
            raise _Abandoned
        self.place, self.payload = place, payload
        with stepped_out():
            self._back.release()
            self._go.acquire()
        self.payload = None
        if self._abandoned:
            raise _Abandoned


def run_in_lockstep(runs: Sequence[Callable[[Halt], None]], decide: Callable[[str, list[Any]], None]) -> None:
    """Execute all ``runs``; wherever they call ``halt(place, payload)`` they wait for each other.

    Args:
        runs: functions of one argument, ``halt``. They are executed without gradients.
        decide: called with the place and the payloads in the order of ``runs`` when all have come there.

    Raises:
        PlanishError: the runs come to different places. What a run or ``decide`` raises is passed on.
    """
    runners = [_Runner(run) for run in runs]
    try:
        while True:
            for runner in runners:
                runner.step()
            places = list(dict.fromkeys(runner.place for runner in runners))
            if len(places) > 1:
                first, second = (place or "the end" for place in places[:2])
                raise PlanishError(
                    f"one calibration batch reaches {first} where another reaches {second}: this pass needs a network "
                    f"that takes the same path for every batch; give batches for which it does"
                )
            if not places or places[0] is None:
                return
            decide(places[0], [runner.payload for runner in runners])
    finally:
        for runner in runners:
            runner.abandon()
