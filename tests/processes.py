"""Several processes on this machine (gloo), started as `accelerate launch` would start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _environment() -> dict[str, str]:
    """That of every process: one thread, no accelerator, nothing left of another launcher."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "FSDP"))}
    return base | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def _rank(rank: int, world: int, port: str) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def _start(module: str, arguments: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Run a module in two processes."""
    base, port = _environment(), _free_port()
    return [_start(module, arguments, base | _rank(rank, 2, port)) for rank in range(2)]


def start_forking(module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Run a module that calls :func:`fork` for as many processes as it wants: they import everything once."""
    return [_start(module, arguments, _environment())]


def finish(running: list[subprocess.Popen[str]], timeout: float = 400) -> list[tuple[str, str]]:
    """What the processes printed on their two streams; they must have ended well."""
    try:
        printed = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return printed


def found_by(running: list[subprocess.Popen[str]]) -> Any:
    """The JSON in the last line of the only process."""
    return json.loads(finish(running, timeout=500)[0][0].splitlines()[-1])


def fork(main: Callable[[], Any], world: int, **environment: str) -> list[Any]:
    """What ``main`` gives in each of ``world`` processes forked from this one, which has computed nothing yet."""
    context, port = multiprocessing.get_context("fork"), _free_port()
    started = []
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        # alone it is a process that no launcher started
        env = (_rank(rank, world, port) if world > 1 else {}) | environment
        process = context.Process(target=_child, args=(main, env, sender))
        process.start()
        sender.close()  # so that a process that dies is noticed
        started.append((process, receiver))
    try:
        return [receiver.recv() for _, receiver in started]
    finally:
        for process, _ in started:
            process.kill()


def _child(main: Callable[[], Any], env: dict[str, str], sender: Any) -> None:
    os.environ.update(env)
    sender.send(main())
