"""The line before a long training: its arithmetic, and that measuring leaves nothing behind."""

from __future__ import annotations

import copy
import re
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from planish.recipes import estimate
from planish.recipes.estimate import Estimate, Stopwatch, measured, plain_step, tell, worth_it
from planish.training import TrainingSettings
from tests.training import tiny


def material(n: int = 24, batch: int = 4) -> SimpleNamespace:
    model = tiny.conv()
    return SimpleNamespace(
        loaded=SimpleNamespace(model=model), train=tiny.loader(n, batch), device=torch.device("cpu")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [([0, 9, 10, 11, 13, 15], 1.5), ([0, 100, 101], 1), ([3, 5], 2)],  # the first step warms up, if there is another
)
def test_a_step_takes_the_median_of_all_but_the_first(stamps, seconds):
    watch = Stopwatch(iter(stamps).__next__)
    for step in range(len(stamps) - 1):
        watch(step, len(stamps), 0.0)
    assert watch.seconds == seconds


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "estimate: 6 epochs of 78 steps at 250 ms, about 12 min in all on cpu, 1.5 GB of memory"),
        (
            {"seconds": 7200.0, "step": 2.0},
            "6 epochs of 78 steps at 2.0 s, about 2.0 h in all on cpu, 1.5 GB of memory",
        ),
        ({"megabytes": None}, "about 12 min in all on cpu"),
        ({"device": "cuda:0", "processes": 8}, "on 8 processes with cuda:0, 1.5 GB of memory each"),
    ],
)
def test_it_is_one_line(change, text):
    base = {"epochs": 6, "steps": 78, "step": 0.25, "seconds": 720.0, "megabytes": 1500.0, "device": "cpu"}
    said = str(Estimate(**{**base, **change}))
    assert said.endswith(text)
    assert "\n" not in said


def test_what_is_told_is_the_cost_in_measured_steps():
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    told = tell(console, material(), 3, (0.5, 800.0), steps=1.15 * 3 * 6, processes=1)
    assert told.seconds == pytest.approx(1.15 * 3 * 6 * 0.5)
    assert (told.epochs, told.steps, told.step, told.megabytes) == (3, 6, 0.5, 800.0)
    assert console.export_text().strip() == str(told)


def test_a_short_training_is_not_worth_it():
    few = material()  # six steps an epoch
    assert [worth_it(few, epochs) for epochs in (1, 16, 17)] == [False, False, True]


def test_measuring_takes_some_steps_of_the_first_batch(monkeypatch):
    seen = []

    def measure(batches, watch):
        watch.clock = count().__next__
        watch.times = [0]
        seen.extend(batches)
        for step, _ in enumerate(batches):
            watch(step, len(batches), 0.0)

    monkeypatch.setattr(estimate, "peak_memory_mb", lambda device: 123.0)
    assert measured(material(), measure) == (1, 123.0)
    assert len(seen) == estimate.MEASURED
    assert all(batch is seen[0] for batch in seen)


def test_measuring_leaves_the_network_and_the_order_of_the_images_alone():
    given = material()
    before = copy.deepcopy(given.loaded.model)
    seconds, megabytes = plain_step(given, TrainingSettings(epochs=9))
    assert seconds > 0
    assert megabytes is None or megabytes > 1
    assert tiny.same(given.loaded.model, before)
    first, second = tiny.conv(), tiny.conv()
    tiny.fit(first, [], given.train)
    tiny.fit(second, [], tiny.loader())
    assert tiny.same(first, second)


@pytest.mark.parametrize(
    ("command", "epochs"),
    [
        (["run", "--arms", "given,flat", "--methods", "rtn", "--schemes", "w4a4", "--epochs", "1"], 1),
        (["flatten", "--epochs", "1"], 1),
        (["train", "--epochs", "2", "--start", "flat", "--accumulation", "2"], 2),
    ],
)
def test_the_commands_say_it(tmp_path, monkeypatch, capsys, command, epochs):
    from planish.cli.main import main
    from tests.cli.conftest import MODEL, make_images

    (tmp_path / "tiny.py").write_text(MODEL)
    make_images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "LEAST", 1)
    options = ["--model", "tiny.py:build", "--data", "data", "--batch-size", "16", "--threads", "1", "--out", "out.st"]
    assert main([*command, *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("estimate: ")]
    assert len(lines) == 1
    assert re.match(rf"estimate: {epochs} epochs? of 3 steps at [\d.]+ (ms|s), about \d+ s in all on cpu", lines[0])
