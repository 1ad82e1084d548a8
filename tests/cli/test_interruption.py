"""Ctrl-C, SIGTERM and kill -9 at any moment: the resumed run gives the identical result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")

RUN = ["--arms", "given,averaged,flat", "--methods", "rtn", "--schemes", "w4a4,w3a3", "--epochs", "3", "--out", "run"]
SOURCES = Path(__file__).parents[2] / "src"
ARMS = ("given", "averaged", "flat")


def outcome(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for row in rows]
    return rows, {arm: (folder / f"{arm}.safetensors").read_bytes() for arm in ARMS}


@pytest.fixture(scope="module")
def undisturbed(zygote, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = zygote.run(folder, ["run", *options, *RUN])
    assert ended.status == 0, ended.err
    rows, arms = outcome(folder / "run")
    assert len(rows) == 9
    assert len(set(arms.values())) == 3
    return rows, arms


# lines: two notes, the reference, then arm, fp32 and two schemes for each of three arms
MOMENTS = [
    (3, signal.SIGINT), (5, signal.SIGTERM), (6, signal.SIGINT), (8, signal.SIGINT), (8, signal.SIGTERM),
    (10, signal.SIGTERM), (12, signal.SIGINT), (14, signal.SIGINT), (8, signal.SIGKILL), (12, signal.SIGKILL),
]  # fmt: skip


@pytest.mark.parametrize(("line", "number"), MOMENTS)
def test_a_stopped_run_resumes_to_the_identical_result(zygote, options, tmp_path, undisturbed, line, number):
    delay = random.Random(f"{line} {number}").uniform(0, 0.06)
    ended = zygote.run(tmp_path, ["run", *options, *RUN], kill=number, after=line, delay=delay)
    assert "Traceback" not in ended.err
    if number == signal.SIGKILL:
        assert ended.status == -signal.SIGKILL
    else:
        assert ended.status == 130, ended.err
        assert "continue with: planish run --resume --out run" in ended.err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / ".run.partial").is_dir()
    ended = zygote.run(tmp_path, ["run", "--resume", "--out", "run", "--trust"])
    assert ended.status == 0, ended.err
    assert outcome(tmp_path / "run") == undisturbed
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_second_signal_stops_at_once(zygote, options, tmp_path):
    """In the middle of a training: the first asks for a checkpoint, which a long step would delay."""
    from planish.recipes.session import stoppable

    # a shell's background jobs begin with Ctrl-C ignored, and then planish ignores it, too
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stoppable() as stop, stop.gently():
            signal.raise_signal(signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), stoppable() as stop:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_a_destructor_is_remembered(monkeypatch):
    """Python drops what a destructor raises, and prints it with a traceback."""
    from planish.recipes.session import stoppable

    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: heard.append(dropped.exc_type))

    class Dies:
        def __init__(self, last):
            self.last = last

        def __del__(self):
            self.last()

    with stoppable() as stop:
        Dies(lambda: signal.raise_signal(signal.SIGTERM))
        assert stop()
        Dies(lambda: 1 / 0)
    assert heard == [ZeroDivisionError]


@pytest.mark.parametrize(("library", "number"), [("rich", signal.SIGTERM), ("torch", signal.SIGINT)])
def test_a_signal_during_the_imports(options, tmp_path, library, number):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Tell:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {library!r}: print('here', flush=True)\n"
        "sys.meta_path.insert(0, Tell())\n"
    )
    (tmp_path / "here").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "planish", "run", *options, *RUN], cwd=tmp_path / "here",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:{SOURCES}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "planish: interrupted before anything was done\n"
    assert list((tmp_path / "here").iterdir()) == []


def test_flatten_goes_on_where_it_was_stopped(zygote, options, tmp_path):
    command = ["flatten", *options, "--epochs", "4", "--scheme", "w3a3"]
    ended = zygote.run(tmp_path, [*command, "--out", "whole.safetensors"])
    assert ended.status == 0, ended.err
    for number in (signal.SIGINT, signal.SIGTERM):
        out = f"{number}.safetensors"
        ended = zygote.run(tmp_path, [*command, "--out", out], kill=number, after=2, delay=0.05)
        assert ended.status == 130, ended.err
        assert f"kept in {out}.checkpoint, the same command continues it" in ended.err
        assert not (tmp_path / out).exists()
        other = zygote.run(tmp_path, [*command, "--out", out, "--lr", "0.1"])
        assert other.status == 2
        assert "other settings (lr was None, is 0.1)" in other.err
        ended = zygote.run(tmp_path, [*command, "--out", out])
        assert ended.status == 0, ended.err
        assert "going on with" in ended.out
        assert (tmp_path / out).read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert not (tmp_path / f"{out}.checkpoint").exists()


DEEP = """
import torch
from torch import nn

class Deep(nn.Sequential):
    planish_preprocessing = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.25], "crop_pct": 1.0}

def build():
    torch.manual_seed(0)
    sizes = [(1, 6), (6, 8), (8, 8), (8, 4)]
    return Deep(*[nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in sizes], nn.Flatten(), nn.Linear(4, 3))
"""


def test_quantize_goes_on_with_the_units_that_are_learned(tiny, planish, monkeypatch, tmp_path):
    from planish.ptq.unit_learning import UnitLearning

    (tmp_path / "deep.py").write_text(DEEP)
    command = ["quantize", "--model", "deep.py:build", *tiny[2:], "--method", "best-cnn", "--scheme", "w2a4"]
    command += ["--iterations", "20", "--out"]
    learn, learned = UnitLearning.learn, []

    def until(most, error):
        def counted(self, objective):
            if len(learned) == most:
                raise error
            found = learn(self, objective)
            learned.append(self.index)
            return found

        learned.clear()
        monkeypatch.setattr(UnitLearning, "learn", counted)

    until(99, None)
    assert planish(*command, "whole.safetensors").status == 0
    every = list(learned)
    assert len(every) == 3
    for done, error in ((0, KeyboardInterrupt()), (1, KeyboardInterrupt()), (2, MemoryError())):
        until(done, error)
        ended = planish(*command, "q.safetensors")
        assert ended.status == (130 if isinstance(error, KeyboardInterrupt) else 2)
        if not done:
            assert "interrupted before there was anything to keep" in ended.err
            assert not (tmp_path / "q.safetensors.checkpoint").exists()
            continue
        assert "kept in q.safetensors.checkpoint, the same command continues it" in ended.err
        until(99, None)
        ended = planish(*command, "q.safetensors")
        assert ended.status == 0, ended.err
        assert "going on with deep.py:build" in ended.out
        assert learned == every[done:]
        assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
        assert not (tmp_path / "q.safetensors.checkpoint").exists()
        (tmp_path / "q.safetensors").unlink()
        (tmp_path / "q.jsonl").unlink()


class Stopped:
    calls = 0

    def __call__(self, *_):
        self.calls += 1
        raise KeyboardInterrupt


def test_a_killed_write_leaves_nothing_behind(tiny, planish, monkeypatch, tmp_path):
    """The half file of a process that was killed while it moved the last one into place."""
    folder = tmp_path / "f.safetensors.checkpoint"
    stopped = Stopped()
    with monkeypatch.context() as patch:
        patch.setattr("planish.cli.flatten.save_weights", stopped)
        assert planish("flatten", *tiny, "--epochs", "1", "--out", "f.safetensors").status == 130
    assert stopped.calls == 1
    assert sorted(path.name for path in tmp_path.glob("f.*")) == [
        "f.jsonl",
        folder.name,
    ]  # the log was in place already
    half, other = tmp_path / ".f.safetensors.77.tmp", tmp_path / ".g.safetensors.77.tmp"
    for path in (half, other):
        path.write_text("half")
    with open(tmp_path / "f.jsonl", "a") as file:
        file.write('{"event": "st')
    assert planish("flatten", *tiny, "--epochs", "1", "--out", "f.safetensors").status == 0
    assert not half.exists()
    assert other.exists()
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] not in ("noise", "seeds")] == ["step", "epoch"]
    assert planish("flatten", *tiny, "--epochs", "1", "--out", "f.jsonl").status == 2
    (tmp_path / "f.safetensors").unlink()
    ended = planish("flatten", *tiny, "--epochs", "1", "--out", "f.safetensors")
    assert "the log goes into f.jsonl, which is already there; give another name, or --overwrite" in ended.err
