"""Ends before the time: too little memory, a full disk. One sentence, nothing lost, and the run goes on."""

from __future__ import annotations

import os

import pytest
import torch

from planish.cli.ended import about_memory, saying_what_is_kept
from planish.errors import NotWritten, PlanishError
from tests.cli.runs import outcome

RUN = ["--arms", "given,flat", "--methods", "rtn", "--schemes", "w4a4", "--epochs", "2", "--out", "run"]


def test_a_real_failure_to_allocate():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    text = about_memory(caught.value, 128)
    assert text is not None
    assert text.startswith(
        "this machine is out of memory with --batch-size 128 (it asked for 1152921504606846976 bytes"
    )
    assert "try --batch-size 64, or fewer --calibration-images" in text
    assert about_memory(MemoryError(), 1) == (
        "this machine is out of memory with --batch-size 1: try fewer --calibration-images, or fewer --workers"
    )
    assert about_memory(RuntimeError("shapes do not fit")) is None


def test_a_device_without_room():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")
    text = about_memory(error, 256)
    assert text == (
        "the device is out of memory with --batch-size 256 (it asked for 2.00 GiB more): try --batch-size 128, or "
        "--mixed-precision bf16 where it trains, or more processes, or ending what else runs on the device"
    )
    assert "a smaller --batch-size" in str(about_memory(error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_without_room():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    assert str(about_memory(caught.value, 2)).startswith("the device is out of memory with --batch-size 2 (it asked")


def test_a_killed_loader_process():
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert "try fewer --workers" in str(about_memory(error))


def test_only_these_are_caught():
    with pytest.raises(RuntimeError, match="shapes"), saying_what_is_kept(lambda: "kept"):
        raise RuntimeError("shapes")
    with pytest.raises(PlanishError, match=r"^no\.$"), saying_what_is_kept(lambda: "kept"):
        raise PlanishError("no.")
    with pytest.raises(NotWritten, match=r"^a: the disk is full; kept$"), saying_what_is_kept(lambda: "kept"):
        raise NotWritten("a: the disk is full")


@pytest.mark.parametrize(("where", "error"), [
    ("planish.training.loop.Stepper.__call__", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")),
    ("planish.recipes.journey.evaluate", MemoryError()),
    ("planish.recipes.journey.quantize", RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")),
])  # fmt: skip
def test_a_run_without_memory_goes_on_later(tiny, planish, monkeypatch, where, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        ended = planish("run", *tiny, *RUN)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert "out of memory with --batch-size 8" in ended.err
    assert "try --batch-size 4" in ended.err
    assert "what was done is kept, continue with: planish run --resume --out run" in ended.err
    assert planish("run", "--resume", "--out", "run", "--trust").status == 0


def test_a_flatten_without_memory_says_what_it_kept(tiny, planish, monkeypatch, tmp_path):
    from planish.training.loop import Stepper

    real = Stepper.__call__

    def fail(self, batch):
        if self.run.step == 8:  # of 6 an epoch
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    command = ["flatten", *tiny, "--epochs", "2", "--out", "f.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", fail)
        ended = planish(*command)
    assert ended.status == 2
    assert "the state is kept in f.safetensors.checkpoint, the same command continues it" in ended.err
    ended = planish(*command)
    assert "going on with" in ended.out
    with monkeypatch.context() as patch:  # before anything is done, a smaller batch is the same command, not another
        patch.setattr(Stepper, "__call__", lambda *_: (_ for _ in ()).throw(MemoryError()))
        ended = planish(*command[:-1], "g.safetensors")
    assert "nothing was done yet that could be kept" in ended.err
    assert planish(*command[:-1], "g.safetensors", "--batch-size", "4").status == 0


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX limits")
def test_a_file_that_cannot_grow(zygote, options, tmp_path):
    """The system refuses one kind of file after the other, as a full disk does: the run goes on where there is room."""
    (tmp_path / "whole").mkdir()
    assert zygote.run(tmp_path / "whole", ["run", *options, *RUN]).status == 0
    expected, size = outcome(tmp_path / "whole" / "run"), sizes(tmp_path / "whole" / "run")
    named = set()
    del size["config.toml"]  # without which nothing has begun
    for name in sorted(size, key=size.__getitem__)[::3]:
        place = tmp_path / name
        place.mkdir()
        ended = zygote.run(place, ["run", *options, *RUN], file_size=size[name] - 50)
        assert ended.status == 2, (name, ended.err)
        assert ended.err.count("\n") == 1, ended.err
        assert "it is larger than a file may be here" in ended.err
        named.add(ended.err.partition(" could not be written")[0].partition(": cannot write here")[0].split("/")[-1])
        assert "continue with: planish run --resume --out run" in ended.err
        assert not (place / "run").exists()
        ended = zygote.run(place, ["run", "--resume", "--out", "run", "--trust"])
        assert ended.status == 0, ended.err
        assert outcome(place / "run") == expected
    assert len(named) >= 2, named
