"""Several processes at one run: all of them compute, the main one prints, writes and decides."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from planish.errors import PlanishError

T = TypeVar("T")


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # PartialState keeps the device that it is first made with, and does not look at this variable itself
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def count_processes() -> int:
    """How many processes work at this run."""
    return int(_state().num_processes)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(_state().is_main_process)


def on_main(function: Callable[[], T]) -> T:
    """What ``function`` gives in the main process, in every process; all of them have to come here.

    Whatever depends on files that the run itself writes is asked in this way: another process would look earlier or
    later, decide differently, and leave the others waiting.

    Raises:
        PlanishError: in every process, if ``function`` raises it.
    """
    if count_processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = function()
        except PlanishError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise PlanishError(answer[1])
    return answer[0]


def leave_group() -> None:
    """The last thing that a process does with others, if there are several: the threads of the group end here.

    An interpreter that ends while they run may be aborted, and its exit status say that the work failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def make_console() -> Console:
    """The console of the main process; that of another one swallows everything."""
    return Console() if is_main() else Console(quiet=True, force_terminal=False)
