"""Two processes on this machine (gloo) against one."""

import json

import pytest

from tests.processes import finish, start_two
from tests.training import two_processes


@pytest.fixture(scope="module")
def found():
    running = start_two("tests.training.two_processes")
    try:
        alone = two_processes.main()
    except BaseException:
        for process in running:
            process.kill()
        raise
    return [*(json.loads(out.splitlines()[-1]) for out, _ in finish(running)), alone]


def test_there_are_two(found):
    assert [f["world"] for f in found] == [2, 2, 1]


def test_half_the_batch_each_equals_the_whole(found):
    first, second, alone = (f["plain"] for f in found)
    assert first == second
    assert first == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("method", ["kd", "fpq", "cr", "mec", "freeze"])
def test_a_quantized_network_is_the_same_in_both(found, method):
    assert found[0][method] == found[1][method]


@pytest.mark.parametrize("what", ["noisy", "recorded", "flat"])
def test_processes_agree(found, what):
    assert found[0][what] == found[1][what]
    assert found[0][what] != found[2][what]  # their activations see other noise


def test_recorders_average_over_the_processes(found):
    for both, alone in zip(found[0]["recorded"], found[2]["recorded"], strict=True):
        assert both[0] == pytest.approx(alone[0], rel=0.3)
        assert both[1] == round(both[1])


def test_each_image_counts_once(found):
    assert [f["evaluation"]["images"] for f in found] == [7, 7, 7]
    assert [f["listed"]["images"] for f in found] == [7, 7, 7]
    assert all(f["ordered"] for f in found)
    for key in ("top1", "nll", "ece"):
        assert found[0]["evaluation"][key] == found[1]["evaluation"][key] == pytest.approx(found[2]["listed"][key])


def test_all_stop_when_one_has_to(found):
    named, told = "batch 1 of epoch 1 holds NaN", "the loss became nan at step "  # by the one that has it, by the other
    assert {f["failed"][:28] for f in found} == {named, told}
    assert {f["stopped"] for f in found} == {2}
