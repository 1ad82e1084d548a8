"""Two processes on this machine (gloo), started as `accelerate launch` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start_two(module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """Run a module in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    ranks = [
        base | {"WORLD_SIZE": "2", "RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for r in range(2)
    ]  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    return [
        subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for env in ranks
    ]


def finish(running: list[subprocess.Popen[str]], timeout: float = 100) -> list[tuple[str, str]]:
    """What the processes printed on their two streams; they must have ended well."""
    try:
        printed = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return printed
