"""Frozen means frozen: bit for bit, under momentum, weight decay and averages."""

import pytest
import torch

from planish.errors import PlanishError
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.annealing import ConfidenceGuidedAnnealing
from planish.qat.ofq import OFQ
from planish.quantizers import StatsQuantizer
from planish.quantizers.statistics import near_threshold
from planish.training import Ingredient
from tests.training import tiny


class Watch(Ingredient):
    """Around the annealing: the weights before and after each step, and where they were undecided."""

    def __init__(self):
        self.steps = []

    def start(self, run):
        taps = {name: m for name, m in run.model.named_modules() if hasattr(m, "format") and name.endswith("weight")}
        self.pairs = []
        for name, tap in taps.items():
            owner = run.model.get_submodule(name.rpartition(".planish_taps")[0])
            if "weight" in owner._parameters and tap.format.bits == 2:
                self.pairs.append((owner._parameters["weight"], tap))

    def before_step(self, run, inputs, labels):
        self.before = [(w.detach().clone(), near_threshold(w, t.grid, BAND)) for w, t in self.pairs]

    def after_step(self, run):
        for (weight, _), (before, undecided) in zip(self.pairs, self.before, strict=True):
            self.steps.append((run.step / run.steps, weight.detach() != before, undecided))


BAND = 0.2


def settings(optimizer="adamw", **options):
    training = tiny.settings(epochs=2, optimizer=optimizer, lr=0.01, weight_decay=0.1)
    return QATSettings(averaging=None, training=training, **options)


class Annealed(Method):
    name = "annealed"

    def ingredients(self, context):
        return [*super().ingredients(context), ConfidenceGuidedAnnealing(context, BAND, 0.5)]


@pytest.mark.parametrize("weights", ["lsq", "statsq"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_confident_weights_stay_and_undecided_ones_move(weights, optimizer):
    watch = Watch()
    train_quantized(
        tiny.conv(), tiny.loader(), "w2a4", Annealed(weights=weights), settings=settings(optimizer), extra=[watch]
    )
    early = [moved for at, moved, _ in watch.steps if at < 0.5]
    late = [(moved, undecided) for at, moved, undecided in watch.steps if at >= 0.5]
    assert len(early) == len(late) == 6
    assert all(moved.float().mean() > 0.9 for moved in early)
    for moved, undecided in late:
        assert not (moved & ~undecided).any()
        assert (moved == undecided).float().mean() > 0.99


def test_with_no_band_almost_nothing_moves_and_with_half_a_step_everything_inside_does():
    w = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    tap = StatsQuantizer(__import__("planish").Format(2, "channel", half_integer=True))
    tap.latest = w
    assert near_threshold(w, tap.grid, 0.0).sum() == 0
    inside = (w / tap.grid.scale).abs() < 1.5  # half a step beyond the outer thresholds at -1 and 1
    assert torch.equal(near_threshold(w, tap.grid, 0.5), inside)


def test_query_and_key_are_annealed_through_their_product():
    """The mask reaches the gradient of the latent weights, which the product shares."""
    seen = {}

    class Look(Ingredient):
        def before_step(self, run, inputs, labels):
            self.bands = [m.band for m in run.model.modules() if isinstance(m, StatsQuantizer)]

        def after_step(self, run):
            seen[run.step / run.steps >= 0.5] = list(self.bands)

        def finish(self, run):
            seen["end"] = [m.band for m in run.model.modules() if isinstance(m, StatsQuantizer)]

    method = OFQ(annealing=0.5, band=BAND)
    train_quantized(tiny.vit(), tiny.loader(size=16), "w2a4", method, settings=settings(), extra=[Look()])
    assert set(seen[False]) == {None}
    assert set(seen[True]) == {None, BAND}  # parameters are put back instead
    assert seen[True].count(BAND) == 4  # the product and the value's weight, in two blocks
    assert set(seen["end"]) == {None}


@pytest.mark.parametrize("band", [0.0, BAND])
def test_the_rows_behind_a_rebuilt_attention_stay_where_nothing_is_undecided(band):
    moved, biases = [], []  # the query's bias is one more row of the product

    class Look(Ingredient):
        def before_step(self, run, inputs, labels):
            self.weight, self.bias = run.model.blocks[0].attn.qkv._parameters.values()
            self.query_bias = self.bias.detach()[:16].clone()
            self.before = self.weight.detach().clone()
            tap = run.model.get_submodule("blocks.0.attn.planish_taps.linear1_weight")
            self.undecided = near_threshold(self.before.chunk(3)[2], tap.grid, band)

        def after_step(self, run):
            changed = self.weight.detach() != self.before
            moved.append((run.step / run.steps >= 0.5, changed[:32].float().mean(), changed[32:], self.undecided))
            biases.append((run.step / run.steps >= 0.5, (self.bias.detach()[:16] != self.query_bias).float().mean()))

    method = OFQ(annealing=0.5, band=band)
    train_quantized(tiny.vit(), tiny.loader(size=16), "w2a4", method, settings=settings(), extra=[Look()])
    assert all(query_key > 0.9 and value.float().mean() > 0.9 for late, query_key, value, _ in moved if not late)
    for _, query_key, value, undecided in (row for row in moved if row[0]):
        assert not (value & ~undecided).any()
        assert query_key == 0 if band == 0 else query_key > 0
    assert all(share > 0.9 for late, share in biases if not late)
    assert all(share == 0 if band == 0 else share > 0 for late, share in biases if late)


def test_averages_stop_where_annealing_begins():
    watch = Watch()
    model = train_quantized(
        tiny.conv(), tiny.loader(), "w2a4", OFQ(annealing=0.5, band=BAND),
        settings=QATSettings(averaging=0.9, training=tiny.settings(epochs=2)), extra=[watch],
    )  # fmt: skip
    last = watch.pairs[0][0].detach()
    assert torch.equal(model[4]._parameters["weight"], last)
    late = [(moved, undecided) for at, moved, undecided in watch.steps if at >= 0.5]
    assert all(not (moved & ~undecided).any() for moved, undecided in late)


def test_errors():
    class Wrong(Method):
        def ingredients(self, context):
            return [ConfidenceGuidedAnnealing(context, -1.0)]

    with pytest.raises(PlanishError, match="band >= 0"):
        train_quantized(tiny.conv(), tiny.loader(), "w2a4", Wrong(), settings=settings())
    with pytest.raises(PlanishError, match=r"annealing takes the last 2 of the run.*annealing in \[0, 1\]"):
        train_quantized(tiny.conv(), tiny.loader(), "w2a4", OFQ(annealing=2.0), settings=settings())
