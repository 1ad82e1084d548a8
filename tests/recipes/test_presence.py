"""Who is gone: bookkeeping with a clock of the test's own, threads with a store in memory, and two processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from planish.errors import PlanishError, is_lost_connection
from planish.recipes import presence
from planish.recipes.presence import Presence, Roll, present
from tests.cli.conftest import MODEL, make_images
from tests.cli.runs import outcome
from tests.processes import start_two


def test_a_sign_that_does_not_change_counts_for_nothing():
    roll = Roll([1, 2], 100.0)
    roll.note(1, "1", 101.0)
    roll.note(2, "1", 101.0)
    roll.note(2, "2", 105.0)
    roll.note(1, "1", 110.0)
    assert roll.missing(110.0, 8.0) == [(1, "is gone: no sign of life for 9 s")]
    assert roll.missing(110.0, 10.0) == []
    roll.note(1, "2", 111.0)
    assert [rank for rank, _ in roll.missing(114.0, 8.0)] == [2]


def test_those_that_have_not_begun_get_more_time():
    roll = Roll([1], 0.0)
    assert roll.missing(presence.SILENCE + 1, presence.SILENCE) == []
    assert [rank for rank, _ in roll.missing(presence.STARTING + 1, presence.SILENCE)] == [1]


def test_those_that_are_done_are_not_missed():
    roll = Roll([1, 2], 0.0)
    roll.note(1, "done", 1.0)
    roll.note(2, "failed", 1.0)
    assert roll.missing(5.0, 1.0) == []  # what ended it may be about to end this process, too
    assert roll.missing(10_000.0, 1.0) == [(2, "has ended with an error")]


class Store(dict):
    """As much of a store as is asked for; ``broken`` once its holder is gone."""

    broken = False

    def set(self, key, value):
        if self.broken:
            raise ConnectionError("gone")
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"BEAT": 0.02, "AFTER_FAILURE": 0.15, "SILENCE": 0.6, "STARTING": 0.6}.items():
        monkeypatch.setattr(presence, name, value)


def watch(store, rank, size, said=None, lost=None):
    mine = Presence(rank, size, lambda: store, lost or (lambda text: said.append(text)))
    mine.start()
    return mine


def test_the_one_that_falls_silent_is_named(quick):
    store, said = Store(), []
    watches = [watch(store, rank, 3, said) for rank in range(3)]
    time.sleep(0.2)
    watches[1]._over.set()  # killed: no goodbye
    assert watches[0].explain(patience=5).startswith("process 1 of 3 is gone: no sign of life for")
    for each in watches:
        each.end("done")
    assert said == []  # whoever asked ends the process itself


def test_the_silent_are_noticed_without_asking(quick):
    store, heard = Store(), threading.Event()
    first = watch(store, 0, 2, lost=lambda text: heard.set())
    other = watch(store, 1, 2, lost=lambda text: None)
    time.sleep(0.1)
    other._over.set()
    assert heard.wait(20)
    first.end("done")


def test_a_goodbye_is_not_a_loss(quick):
    store, said = Store(), []
    first, other = watch(store, 0, 2, said), watch(store, 1, 2, said)
    time.sleep(0.1)
    other.end("done")
    assert first.explain(patience=1.0) is None
    first.end("done")
    assert store["0"] == store["1"] == b"done"
    assert said == []


def test_the_store_goes_with_the_process_that_holds_it(quick):
    store, said = Store(), []
    first = watch(store, 1, 2, said)
    store["0"] = b"1"
    time.sleep(0.1)
    store.broken = True
    assert "process 0 of 2 is gone" in first.explain(patience=5)
    first.end("done")


def test_alone_there_is_nobody_to_watch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = threading.active_count()
    with present():
        assert threading.active_count() == before
    assert not is_lost_connection(RuntimeError("Connection closed by peer"))


def test_only_failures_of_a_connection_are_explained(monkeypatch, quick):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = Store({"1": b"1"})
    monkeypatch.setattr(presence, "_store", lambda: store)
    with pytest.raises(RuntimeError, match="shapes"), present():
        raise RuntimeError("shapes do not fit")
    assert store["0"] == b"failed"
    with pytest.raises(PlanishError, match=r"process 1 of 2 is gone.*start all processes again"), present():
        raise RuntimeError("[..gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:7000")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_a_killed_process_ends_the_other_with_a_sentence(tmp_path):
    """And the run goes on to the result of an undisturbed one."""
    (tmp_path / "tiny.py").write_text(MODEL)
    make_images(tmp_path / "data")
    kept = tmp_path / ".killed.partial" / "log.jsonl"
    options = ["--model", f"{tmp_path / 'tiny.py'}:build", "--data", str(tmp_path / "data"), "--batch-size", "4"]
    rest = ["--threads", "1", "--epochs", "12", "--arms", "flat", "--methods", "rtn", "--schemes", "w4a4"]
    both = start_two("planish", "run", *options, *rest, "--out", str(tmp_path / "killed"))
    try:
        until = time.monotonic() + 120
        while not (kept.exists() and '"epoch"' in kept.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        both[1].send_signal(signal.SIGKILL)
        _, errors = both[0].communicate(timeout=120)
    finally:
        for process in both:
            process.kill()
    assert both[0].returncode == 2
    assert "Traceback" not in errors
    assert "planish: process 1 of 2 is gone: no sign of life for" in errors
    assert "start all processes again to continue (a run with --resume)" in errors
    both = start_two("tests.recipes.resume_and_repeat", str(tmp_path), *options, *rest)
    for process in both:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert Path(tmp_path / "killed" / "report.html").exists()
