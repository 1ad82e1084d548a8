"""Oscillations against a twin that walks through the history of each weight, and the report on known positions."""

import itertools
import json

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.functional import Grid, dequantize, quantize
from planish.network import taps_of
from planish.qat import QATSettings, train_quantized
from planish.qat.oscillation import (
    OscillationTracker,
    follow,
    oscillation_report,
    rounded_weights,
    threshold_distance,
    threshold_histogram,
)
from planish.training import Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=3, lr=0.1))
HALF = Grid(torch.tensor(0.5), torch.tensor(0.0), -2, 1, 0.5)  # levels -0.75, -0.25, 0.25, 0.75


def frequencies_twin(history, momentum):
    """Section 4.1 and equation 5, one weight at a time: was this change against the previous one?"""
    result = []
    for codes in zip(*history, strict=True):
        last, frequency = 0, 0.0
        for before, after in itertools.pairwise(codes):
            oscillated = 0
            if after != before:
                direction = 1 if after > before else -1
                oscillated = int(last == -direction)
                last = direction
            frequency = momentum * oscillated + (1 - momentum) * frequency
        result.append(frequency)
    return result


def tracked(history, **options):
    tracker = OscillationTracker(**options)
    first = history[0]
    tracker.codes, tracker.direction = {"w": first.clone()}, {"w": torch.zeros_like(first)}
    tracker.frequency = {"w": torch.zeros_like(first)}
    for codes in history[1:]:
        tracker.update("w", codes.clone())
    return tracker


def test_frequencies_are_those_of_the_twin():
    history = torch.randint(-2, 2, (40, 30), generator=torch.Generator().manual_seed(0)).float()
    tracker = tracked(list(history), momentum=0.05)
    torch.testing.assert_close(tracker.frequency["w"], torch.tensor(frequencies_twin(history.tolist(), 0.05)))
    assert tracker.frequency["w"].max() > 0.2


def test_only_a_change_against_the_previous_one_counts():
    walks = torch.tensor(
        [
            [0, 1, 2, 3, 3],  # always up
            [0, 1, 0, 0, 0],  # up and down: once
            [0, 1, 1, 0, 1],  # a pause between: twice
            [2, 0, 1, -1, 0],  # steps of any length: three times
            [1, 1, 1, 1, 1],
        ]
    ).float()
    turns, direction = torch.zeros(5), torch.zeros(5)
    for before, after in itertools.pairwise(walks.T):
        turned, direction = follow(after, before, direction)
        turns += turned
    assert turns.tolist() == [0, 1, 2, 3, 0]
    assert direction.tolist() == [1, -1, 1, 1, 0]


def test_a_weight_that_turns_back_in_every_step_has_frequency_one():
    tracker = tracked([torch.tensor([float(i % 2), 0.0]) for i in range(2000)])
    assert tracker.frequency["w"][0] == pytest.approx(1, abs=1e-4)
    assert tracker.share() == 0.5
    assert tracker.oscillating() == {"w": 0.5}


def test_one_turn_counts_for_about_seventy_steps():
    """With the paper's momentum and threshold: 0.01 * 0.99^n falls to 0.005 at n = 69."""
    turn = [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.0])]
    assert tracked(turn + [torch.tensor([0.0])] * 68).share() == 1
    assert tracked(turn + [torch.tensor([0.0])] * 70).share() == 0


def test_a_toy_weight_between_two_levels_oscillates():
    """The paper's regression: min (0.252 - q(w))^2 with the straight-through gradient."""
    grid = Grid(torch.tensor(0.5), torch.tensor(0.0), -2, 1)
    tracker, w = OscillationTracker(), torch.tensor([0.0])
    tracker.codes, tracker.direction = {"w": quantize(w, grid)}, {"w": torch.zeros(1)}
    tracker.frequency = {"w": torch.zeros(1)}
    for _ in range(2000):
        w = w - 0.1 * 2 * (dequantize(quantize(w, grid), grid) - 0.252)
        tracker.update("w", quantize(w, grid))
    assert tracker.frequency["w"] > 0.3
    assert threshold_distance(w, grid) < 0.1  # it stays at the threshold, 0.25


def test_distance_to_the_nearest_threshold():
    weight = torch.tensor([0.0, 0.25, -0.25, 0.1, 0.5, 0.55, 0.75, 1.0, -2.0])
    expected = torch.tensor([0.0, 0.5, 0.5, 0.2, 0.0, 0.1, 0.5, 1.0, 3.0])
    torch.testing.assert_close(threshold_distance(weight, HALF), expected)
    affine = Grid(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]]), 0, 3)  # levels -1..2 and 0..6
    weight = torch.tensor([[-0.5, 0.0, 1.4], [1.0, 4.0, 5.0]])
    torch.testing.assert_close(threshold_distance(weight, affine), torch.tensor([[0.0, 0.5, 0.1], [0.0, 0.5, 0.0]]))


def test_histogram_of_known_positions():
    weight = torch.tensor([0.0, 0.01, 0.06, 0.24, 0.25, 0.75, 0.9, -3.0])
    shares = threshold_histogram(weight, HALF, bins=5)
    assert shares.tolist() == [0.25, 0.125, 0, 0, 0.375, 0.25]
    # uniform between the outermost levels: every distance is equally likely, and nothing lies beyond
    flat = threshold_histogram(torch.linspace(-0.75, 0.75, 60_001), HALF, bins=10)
    torch.testing.assert_close(flat[:10], torch.full((10,), 0.1), atol=1e-3, rtol=0)
    assert flat[10] == 0


class History(Ingredient):
    def start(self, run):
        self.seen = [self.look(run)]

    def after_step(self, run):
        self.seen.append(self.look(run))

    def look(self, run):
        return {name: weight.codes.flatten() for name, weight in rounded_weights(run.model).items()}


def test_after_a_report_midway_it_counts_anew():
    """Weights that oscillate in the first half only do not oscillate in the report at the end."""

    class Shake(Ingredient):
        def before_step(self, run, inputs, labels):
            if run.progress < 0.5:  # across the threshold between two codes and back
                weight = rounded_weights(run.model)["4.weight"]
                self.step = (-1) ** run.step * 1.5 * weight.tap.grid.scale.detach()
                with torch.no_grad():
                    weight.parameter.add_(self.step)

    settings = QATSettings(averaging=None, training=tiny.settings(epochs=2, lr=1e-9))
    for report_at, after in ((0.5, 0.0), (None, 0.5)):
        tracker = OscillationTracker(report_at=report_at)
        train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=settings, extra=[tracker, Shake()])
        assert tracker.share() >= after
        assert report_at is None or tracker.share() == 0
        assert (tracker.earlier is None) == (report_at is None)
        assert report_at is None or tracker.earlier["oscillating"] > 0.5


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_in_training_it_counts_what_happens_and_changes_nothing(method):
    tracker, history = OscillationTracker(momentum=0.2), History()
    seen = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, extra=[tracker, history])
    alone = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS)
    assert tiny.same(seen, alone)
    assert set(tracker.frequency) == {"4.weight"}  # the first and the last layer have 8 bits
    codes = [step["4.weight"].tolist() for step in history.seen]
    expected = torch.tensor(frequencies_twin(codes, 0.2))
    torch.testing.assert_close(tracker.frequency["4.weight"].flatten(), expected)
    assert expected.max() > 0


def test_report_is_plain_and_sums_up_the_layers():
    tracker = OscillationTracker()
    trained = train_quantized(tiny.vit(), tiny.loader(size=16), "w2a2", settings=SETTINGS, extra=[tracker])
    report = json.loads(json.dumps(oscillation_report(trained, tracker)))
    layers = report["layers"].values()
    assert report["weights"] == sum(layer["weights"] for layer in layers)
    assert report["oscillating"] == pytest.approx(tracker.share())
    assert sum(report["histogram"]) == pytest.approx(1)
    near = sum(layer["weights"] * layer["near"] for layer in layers) / report["weights"]
    assert report["near"] == pytest.approx(near)
    assert sum(report["histogram"][:2]) == pytest.approx(report["near"], abs=1e-3)  # two of ten parts of half a step
    assert "oscillating" not in oscillation_report(trained)


def test_counting_goes_on_after_an_interruption(tmp_path):
    def fit(tracker, **options):
        return train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS, extra=[tracker], **options)

    whole, first, second, steps = OscillationTracker(), OscillationTracker(), OscillationTracker(), []
    fit(whole)
    with pytest.raises(Interrupted):
        fit(first, checkpoint_dir=tmp_path / "c", should_stop=lambda: steps.append(1) or len(steps) == 10)
    fit(second, checkpoint_dir=tmp_path / "c", resume=True)
    for kept in ("codes", "direction", "frequency"):
        assert torch.equal(getattr(whole, kept)["4.weight"], getattr(second, kept)["4.weight"])
    assert whole.frequency["4.weight"].max() > 0


def test_errors():
    with pytest.raises(PlanishError, match="momentum"):
        OscillationTracker(momentum=0.0)
    with pytest.raises(PlanishError, match="no weight"):
        oscillation_report(nn.Linear(2, 2))
    trained = train_quantized(tiny.conv(), tiny.loader(), "w8a8", settings=SETTINGS, epochs=0)
    with pytest.raises(PlanishError, match="4 bits or fewer"):
        oscillation_report(trained)
    assert dict(taps_of(trained))
