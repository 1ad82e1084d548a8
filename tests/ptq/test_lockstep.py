"""Runs that wait for each other: order, errors, and that nothing is left running."""

import threading

import pytest
import torch

from planish.errors import PlanishError
from planish.ptq.lockstep import run_in_lockstep


def walker(name, places, events):
    def run(halt):
        for place in places:
            events.append((name, place))
            halt(place, f"{name}{place}")
        events.append((name, "end"))

    return run


def test_all_come_to_a_place_before_it_is_decided_and_one_runs_at_a_time():
    events = []
    runs = [walker(name, "xy", events) for name in "abc"]
    run_in_lockstep(runs, lambda place, payloads: events.append((place, payloads)))
    expected = [("a", "x"), ("b", "x"), ("c", "x"), ("x", ["ax", "bx", "cx"])]
    expected += [("a", "y"), ("b", "y"), ("c", "y"), ("y", ["ay", "by", "cy"])]
    assert events == [*expected, ("a", "end"), ("b", "end"), ("c", "end")]


def test_runs_without_halts_and_no_runs_at_all():
    done = []
    run_in_lockstep([lambda halt: done.append(torch.is_grad_enabled())], pytest.fail)
    assert done == [False]
    run_in_lockstep([], pytest.fail)


def test_different_paths_are_refused():
    events = []
    runs = [walker("a", "xy", events), walker("b", "x", events), walker("c", "z", events)]
    with pytest.raises(PlanishError, match="one calibration batch reaches x where another reaches z"):
        run_in_lockstep(runs, lambda place, payloads: None)
    with pytest.raises(PlanishError, match="reaches y where another reaches the end"):
        run_in_lockstep(runs[:2], lambda place, payloads: None)


@pytest.mark.parametrize("where", ["run", "decide"])
def test_an_error_is_passed_on_and_no_thread_is_left(where):
    count, ended = threading.active_count(), []

    def fails(halt):
        halt("x", None)
        raise ValueError("run")

    def cleans_up(halt):
        try:
            halt("x", None)
            halt("y", None)
        except Exception:  # a model may catch errors: it is not to catch this one
            ended.append("caught")
        finally:
            ended.append("closed")

    def decide(place, payloads):
        if where == "decide":
            raise ValueError("decide")

    with pytest.raises(ValueError, match=where):
        run_in_lockstep([cleans_up, fails, cleans_up], decide)
    assert ended == ["closed", "closed"]
    assert threading.active_count() == count
