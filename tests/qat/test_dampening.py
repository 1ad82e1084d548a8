"""Dampening and freezing against the paper's equations, and what they promise of a whole run."""

import math

import pytest
import torch

from planish.errors import PlanishError
from planish.functional import Grid, quantize
from planish.network import taps_of
from planish.qat import QATSettings, train_quantized
from planish.qat.dampening import Dampen, Dampening, Freeze, Freezing, anneal, dampening
from planish.qat.method import Method
from planish.qat.oscillation import OscillationTracker, oscillation_report, rounded_weights
from planish.training import Ingredient, Interrupted
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=4, lr=0.1))
GRID = Grid(torch.tensor([[0.3], [0.7]]), torch.zeros(2, 1), -2, 1, 0.5)


def dampening_twin(weight, grid):
    """Equation 7, weight by weight: every level is tried, and the clip is spelled out."""
    total = torch.zeros(())
    for row, scale in zip(weight, grid.scale.flatten(), strict=True):
        levels = [(k + grid.offset) * scale for k in range(grid.qmin, grid.qmax + 1)]
        for w in row:
            nearest = min(levels, key=lambda level, w=w: (w.detach() - level).abs())
            clipped = levels[0] if w < levels[0] else levels[-1] if w > levels[-1] else w
            total = total + (nearest - clipped) ** 2
    return total


def test_the_loss_is_that_of_the_equation():
    weight = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, twin = dampening(weight, GRID), dampening_twin(weight, GRID)
    torch.testing.assert_close(ours, twin)
    mine, theirs = torch.autograd.grad(ours, weight)[0], torch.autograd.grad(twin, weight)[0]
    torch.testing.assert_close(mine, theirs)
    outside = (weight.abs() > 1.5 * GRID.scale).detach()
    assert outside.any()
    assert (mine[outside] == 0).all()
    assert (mine[~outside] != 0).all()


def test_no_gradient_reaches_the_scale():
    def trained(epochs):
        model, extra = tiny.conv(), [Dampening(5.0)]
        return train_quantized(
            model, tiny.loader(), "w2a2", Method(task=0.0), settings=plain, epochs=epochs, extra=extra
        )

    plain = QATSettings(averaging=None, training=tiny.settings(weight_decay=0.0))
    before, after = trained(0), trained(2)
    assert not torch.equal(before[4]._parameters["weight"], after[4]._parameters["weight"])
    for name, tap in taps_of(after):
        assert torch.equal(tap.scale, dict(taps_of(before))[name].scale)


def test_annealing_is_a_cosine():
    assert anneal(0.0, 0.4, 0.0, 0.0) == 0
    assert anneal(0.0, 0.4, 0.5, 0.0) == pytest.approx(0.2)
    assert anneal(0.0, 0.4, 1.0, 0.0) == pytest.approx(0.4)
    assert anneal(0.1, 0.01, 0.2, 0.25) == pytest.approx(0.1)
    assert anneal(0.1, 0.01, 0.5, 0.25) == pytest.approx(0.01 + 0.09 * (1 + math.cos(math.pi / 3)) / 2)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_in_training_the_weight_rises_along_the_cosine(start):
    losses, twins = [], []

    class Twin(Ingredient):
        def loss(self, run, inputs, labels, logits):
            (weight,) = rounded_weights(run.model).values()
            part = max(0.0, (run.progress - start) / (1 - start))
            share = (1 - math.cos(math.pi * part)) / 2
            twins.append(2.0 * share * dampening(weight.parameter, weight.tap.grid).item())

    method = Dampen(task=0.0, dampen=2.0, dampen_start=start)
    train_quantized(
        tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, epochs=1, extra=[Twin()],
        progress=lambda step, steps, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[0] == 0
    assert losses[-1] > 0
    assert losses == pytest.approx(twins, rel=1e-4)


def test_dampening_pulls_weights_to_their_levels():
    def far(method):
        trained = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS)
        return oscillation_report(trained, bins=2)["histogram"][0]

    assert far(Dampen(dampen=2.0)) < far("lsq") - 0.1


def test_no_dampening_is_lsq():
    plain = train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS)
    assert tiny.same(plain, train_quantized(tiny.conv(), tiny.loader(), "w2a2", Dampen(dampen=0.0), settings=SETTINGS))
    unreached = Freeze(freeze_first=2.0, freeze_last=2.0)
    assert tiny.same(plain, train_quantized(tiny.conv(), tiny.loader(), "w2a2", unreached, settings=SETTINGS))


def freezing_twin(history, momentum, thresholds):
    """Algorithm 1 for one weight: the codes that its latent value has, and those that it is used with."""
    used, mean, frequency, last, frozen = [history[0]], float(history[0]), 0.0, 0, None
    for code, threshold in zip(history[1:], thresholds, strict=True):
        code = frozen if frozen is not None else code
        change = (code > used[-1]) - (code < used[-1])
        frequency = momentum * (change * last == -1) + (1 - momentum) * frequency
        last = change or last
        mean = momentum * code + (1 - momentum) * mean
        if frozen is None and threshold is not None and frequency > threshold:
            frozen = code = round(mean)
        used.append(code)
    return used, frozen, frequency


class Codes(Ingredient):
    """The codes before and after another ingredient's part."""

    def __init__(self, other):
        self.other, self.free, self.used = other, [], []

    def start(self, run):
        self.other.start(run)
        self.free, self.used = [self.look(run)], [self.look(run)]

    def after_step(self, run):
        self.free.append(self.look(run))
        self.other.after_step(run)
        self.used.append(self.look(run))

    def look(self, run):
        (weight,) = rounded_weights(run.model).values()
        return weight.codes.flatten().tolist()


class Shake(Ingredient):
    """Steps that are long enough to lead a weight from its level to the next."""

    def after_step(self, run):
        for weight in rounded_weights(run.model).values():
            weight.parameter.data += self.size * torch.randn(weight.parameter.shape) * weight.tap.grid.scale


@pytest.mark.parametrize("size", [0.0, 0.4])
def test_freezing_is_algorithm_1(size):
    freezing, shake = Freezing(0.25, 0.15, start=0.5, momentum=0.2), Shake()
    codes, shake.size = Codes(freezing), size
    train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS, extra=[shake, codes])
    steps = len(codes.free) - 1
    progress = [step / steps for step in range(steps)]
    thresholds = [anneal(0.25, 0.15, p, 0.5) if p >= 0.5 else None for p in progress]
    count, frequencies = 0, []
    for free, used in zip(zip(*codes.free, strict=True), zip(*codes.used, strict=True), strict=True):
        expected, frozen, frequency = freezing_twin(free, 0.2, thresholds)
        assert list(used) == expected
        count += frozen is not None
        frequencies.append(frequency)
    assert count > 3
    torch.testing.assert_close(freezing.frequency["4.weight"].flatten(), torch.tensor(frequencies))
    assert freezing.share_frozen() == pytest.approx(count / 432)


def test_nothing_is_frozen_before_the_start():
    class Watch(Ingredient):
        def after_step(self, run):
            self.seen.append((run.progress, freezing.share_frozen()))

    freezing, watch = Freezing(0.001, 0.001, start=0.5), Watch()
    watch.seen = []
    train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS, extra=[freezing, watch])
    assert all(share == 0 for progress, share in watch.seen if progress < 0.5)
    assert next(share for progress, share in watch.seen if progress >= 0.5) > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_codes_do_not_move(optimizer):
    """Whatever momentum, decay and a moving step do; and they are the codes of the network that is handed back."""
    training = tiny.settings(epochs=6, lr=0.1 if optimizer == "sgd" else 0.02, optimizer=optimizer, weight_decay=0.3)
    freezing, seen = Freezing(0.1, 0.05, start=0.1, momentum=0.2), {}

    class Watch(Ingredient):
        def after_step(self, run):
            frozen, codes = freezing.frozen["4.weight"], rounded_weights(run.model)["4.weight"].codes
            if "frozen" in seen:
                assert (frozen | ~seen["frozen"]).all()
                assert torch.equal(codes[seen["frozen"]], seen["codes"][seen["frozen"]])
            seen.update(frozen=frozen.clone(), codes=codes)

    settings = QATSettings(averaging=None, training=training)
    trained = train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=settings, extra=[freezing, Watch()])
    frozen = seen["frozen"]
    assert 0 < frozen.float().mean() < 1
    tap, weight = dict(taps_of(trained))["4.weight"], trained[4]._parameters["weight"]
    assert torch.equal(quantize(weight, tap.grid)[frozen], freezing.held["4.weight"][frozen])


def test_frozen_weights_do_not_oscillate():
    def share(method, *more):
        tracker = OscillationTracker(momentum=0.1, threshold=0.05)
        train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, extra=[tracker])
        return tracker.share()

    freeze = Freeze(freeze_first=0.05, freeze_last=0.02, freeze_start=0.0, freeze_momentum=0.1)
    assert share(freeze) < share("lsq") / 2


def test_freezing_goes_on_after_an_interruption(tmp_path):
    method, steps = Freeze(freeze_first=0.1, freeze_last=0.05, freeze_momentum=0.2), []
    whole = train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS)
    assert not tiny.same(whole, train_quantized(tiny.conv(), tiny.loader(), "w2a2", settings=SETTINGS))
    with pytest.raises(Interrupted):
        train_quantized(
            tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, checkpoint_dir=tmp_path / "c",
            should_stop=lambda: steps.append(1) or len(steps) == 15,
        )  # fmt: skip
    resumed = train_quantized(
        tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, checkpoint_dir=tmp_path / "c", resume=True
    )
    assert tiny.same(whole, resumed)


def test_with_distillation_and_another_quantizer():
    for method in (Dampen(distillation=1.0, weights="statsq"), Freeze(distillation=1.0, weights="statsq")):
        assert isinstance(method, Method)
        train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, epochs=1)


def test_errors():
    for method in (Dampen(weights="dorefa"), Freeze(weights="dorefa")):
        with pytest.raises(PlanishError, match="DoReFaQuantizer transforms them first"):
            train_quantized(tiny.conv(), tiny.loader(), "w2a2", method, settings=SETTINGS, epochs=1)
    with pytest.raises(PlanishError, match="not negative"):
        Dampening(-1.0)
    with pytest.raises(PlanishError, match="cannot rise"):
        Freezing(0.01, 0.1)
