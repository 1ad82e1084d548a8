"""One, two and four processes on this machine (gloo): the same seed and the same global batch."""

import pytest

from tests.processes import found_by, start_forking
from tests.training.several_processes import METHODS

MANY = ("2", "4")


@pytest.fixture(scope="module")
def everything():
    return found_by(start_forking("tests.training.several_processes"))


@pytest.fixture(scope="module")
def found(everything):
    return {world: everything[world] for world in ("1", "2", "4")}


@pytest.fixture(scope="module")
def alone(everything):
    return everything["whole"][0]


@pytest.fixture(scope="module")
def split(everything):
    return everything["split"]


def test_there_are_one_two_and_four(found):
    assert {world: [f["world"] for f in ranks] for world, ranks in found.items()} == {
        "1": [1], "2": [2, 2], "4": [4, 4, 4, 4],
    }  # fmt: skip


@pytest.mark.parametrize(
    "what",
    ["plain", "losses", "parts", "stock", "list", "norms", "kinds", "clip", "off", "weights", "lsq", "ranges",
     "qdrop"],
)  # fmt: skip
@pytest.mark.parametrize("world", MANY)
def test_without_noise_on_images_the_result_is_that_of_one_process(found, what, world):
    alone = found["1"][0][what]
    assert len(alone) > 10
    for one in found[world]:
        assert one[what] == found[world][0][what]
        assert one[what] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("world", MANY)
def test_rounded_networks_with_batch_statistics_differ_by_roundings(found, world):
    assert found[world][0]["lsq, norms"] == pytest.approx(found["1"][0]["lsq, norms"], abs=1e-4)
    assert all(one["lsq, norms"] == found[world][0]["lsq, norms"] for one in found[world])


def test_parts_of_a_batch_give_the_step_of_the_whole(found):
    assert found["1"][0]["parts"] == pytest.approx(found["1"][0]["whole"], abs=1e-5)
    assert found["1"][0]["off"] != found["1"][0]["clip"] != found["1"][0]["weights"]


@pytest.mark.parametrize("what", ["ranges", "qdrop"])
def test_every_process_calibrates_and_reconstructs_alike(found, what):
    """Bit for bit: all of them take all calibration images."""
    assert all(one[what] == found["1"][0][what] for ranks in found.values() for one in ranks)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_network_is_the_same_in_both(found, method):
    assert found["2"][0][method] == found["2"][1][method]


@pytest.mark.parametrize("what", ["noisy", "recorded", "rounded", "attention"])
@pytest.mark.parametrize("world", MANY)
def test_processes_agree(found, what, world):
    assert all(one[what] == found[world][0][what] for one in found[world])
    assert found[world][0][what] != found["1"][0][what]  # they see other noise, or other images at a time


@pytest.mark.parametrize("world", MANY)
def test_recorders_average_over_the_processes(found, world):
    for both, alone in zip(found[world][0]["recorded"], found["1"][0]["recorded"], strict=True):
        assert both[0] == pytest.approx(alone[0], rel=0.4)
        assert both[1] == round(both[1])


def test_seeds_are_logged(found):
    for world, ranks in found.items():
        events = ranks[0]["seeds"]
        assert [event.get("on") for event in events] == ["weights", "activations", None]
        assert [len(event["seeds"]) for event in events[:2]] == [1, int(world)]
        assert events[2]["processes"] == len(events[2]["first_step"]) == len(set(events[2]["first_step"])) == int(world)


def test_each_image_counts_once(found):
    every = [one for ranks in found.values() for one in ranks]
    assert {one["evaluation"]["images"] for one in every} == {one["listed"]["images"] for one in every} == {7}
    assert all(one["ordered"] for one in every)
    for key in ("top1", "nll", "ece"):
        assert all(one["evaluation"][key] == pytest.approx(found["1"][0]["listed"][key]) for one in every)


def test_all_stop_when_one_has_to(found):
    every = [one for ranks in found.values() for one in ranks]
    assert {one["failed"] for one in every} == {"batch 1 of epoch 1 holds NaN"}
    assert {one["stopped"] for one in every} == {2}
    assert ["unused" in one for one in every] == [False] + 6 * [True]  # alone, nobody waits for its gradient
    assert "gets no gradient" in found["2"][0]["unused"]


def test_weights_are_split_while_they_are_trained_and_whole_afterwards(split, alone):
    assert [one["seen"] for one in split] == [True, True]
    assert not alone["seen"]
    assert all(one["as before"] for one in (*split, alone))


@pytest.mark.parametrize("what", ["sam", "sgd", "adamw", "residual", "clipped", "lsq", "pact"])
def test_a_split_network_is_trained_like_a_whole_one(split, alone, what):
    for one in split:
        assert one[what] == split[0][what]
        assert one[what] == pytest.approx(alone[what], abs=1e-5)


def test_a_split_network_is_flattened_under_all_noise(split, alone):
    assert split[0]["flat"] == split[1]["flat"] == alone["flat"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_split_training_goes_on_from_its_checkpoint_which_is_whole(split, alone, optimizer):
    assert all(one[f"resumed {optimizer}"] for one in (*split, alone))
    assert {one["checkpoint"] for one in (*split, alone)} == {alone["checkpoint"]}


@pytest.mark.parametrize(("method", "what"), [("ofq", "Annealing"), ("gplq", "FeatureMimicry"), ("freeze", "Freezing")])
def test_what_needs_whole_weights_is_refused(split, alone, method, what):
    assert isinstance(alone[method], list)
    assert all(what in one[method] and "leave --use_fsdp out" in one[method] for one in split)


def test_the_last_good_weights_of_a_split_training_are_whole(split, alone):
    assert all(one["good"] for one in (*split, alone))


def test_version_1_is_refused(split, alone):
    assert "give --fsdp_version 2" in split[0]["first"]
    assert "first" not in alone
