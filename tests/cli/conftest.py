"""A network and images so small that a whole run takes seconds, and a process that starts commands quickly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

MODEL = """
import torch
from torch import nn

LOOKS = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.25], "crop_pct": 1.0}

class Tiny(nn.Module):
    planish_preprocessing = LOOKS
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Linear(128, classes)
    def forward(self, x):
        return self.head(self.conv2(self.norm(self.conv1(x)).relu()).relu().flatten(1))

def build(classes=3):
    torch.manual_seed(0)
    return Tiny(classes)

def four():
    return build(4)

def plain():
    model = build()
    model.norm = nn.Identity()
    return model

def bare():
    model = build()
    model.planish_preprocessing = None
    return model

def raising():
    raise KeyError("no")

class Recurrent(nn.Module):
    planish_preprocessing = LOOKS
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])
"""


def make_images(folder: Path, classes: int = 3, each: int = 20) -> Path:
    """Noisy stripes, the class in their place."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 100, (16, 16))
            pixels[label * 5 : label * 5 + 5] += 120
            Image.fromarray(pixels.astype("uint8")).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(MODEL)
    make_images(folder / "data")
    return folder


@pytest.fixture
def tiny(options, tmp_path, monkeypatch) -> list[str]:
    """The options, with the test's own folder as the working directory."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    return options


@pytest.fixture(scope="session")
def options(shared: Path) -> list[str]:
    """The options for the tiny network on the tiny data."""
    data = ["--data", str(shared / "data"), "--batch-size", "8", "--threads", "1"]
    return ["--model", f"{shared / 'tiny.py'}:build", *data]


@dataclass
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture
def planish(capsys):
    """Run a command in this process."""

    def call(*arguments: object) -> Ended:
        from planish.cli.main import main

        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # from tyro
            status = int(stop.code or 0)
        return Ended(status, *capsys.readouterr())

    return call


ZYGOTE = """
import json, os, resource, signal, sys
import planish.cli.flatten, planish.cli.quantize, planish.cli.run, planish.cli.train
from planish.cli.main import entry
import torch
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        if job["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
        for number, name in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w")
        sys.argv = ["planish", *job["argv"]]
        entry()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Zygote:
    """A process that has everything imported and forks for each command: what takes seconds is paid once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(
        self, cwd: Path, argv: list[str], *, kill: signal.Signals | None = None, after: int = 0, delay: float = 0.0,
        file_size: int | None = None,
    ) -> Ended:  # fmt: skip
        """Run a command; ``kill`` is sent ``delay`` seconds after the command's ``after``-th line of output.

        ``file_size``: no file of the command can grow beyond so many bytes; a write fails as on a full disk.
        """
        out, err = cwd / "out.txt", cwd / "err.txt"
        out.write_text("")
        job = {"cwd": str(cwd), "argv": argv, "out": str(out), "err": str(err), "file_size": file_size}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if kill is not None:
            until = time.monotonic() + 60
            while out.read_text().count("\n") < after and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it has ended already
                os.kill(pid, kill)
        status = int(self.process.stdout.readline())
        return Ended(status, out.read_text(), err.read_text())


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.process.stdin.close()
    zygote.process.wait(timeout=30)
