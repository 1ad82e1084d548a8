"""The reconstruction engine: what it lowers, what it leaves behind, what it refuses."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.network import taps_of
from planish.ptq import Calibrate, FoldBatchNorm, Reconstruct, Round, quantize, reconstruction
from planish.ptq.learners import LEARNERS
from planish.ptq.objectives import OBJECTIVES
from planish.quantizers import UniformQuantizer
from planish.scheme import Format, Scheme
from tests.training import tiny

torch.set_num_threads(1)
BASE = [FoldBatchNorm(), Calibrate(), Round()]
QUICK = {"iterations": 60, "batch": 8}


def images(size=8, n=32):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(n, 1, size, size, generator=generator).split(16))


def learned(model, scheme="w2a4", size=8, log=None, **options):
    passes = [*BASE, Reconstruct(**{**QUICK, **options})]
    return quantize(model.eval(), images(size), scheme, passes, log=log)


def errors_of_units(model, scheme, size=8, **options):
    lines = []
    better = learned(model, scheme, size, log=lines.append, **options)
    return better, {line["unit"]: line["after"] / line["before"] for line in lines if line["event"] == "unit"}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize(("build", "units"), [(tiny.conv, ["4"]), (tiny.vit, ["blocks.0", "blocks.1"])])
def test_every_learner_brings_the_outputs_nearer(learner, build, units):
    model, size = build().eval(), 16 if build is tiny.vit else 8
    before = {name: value.clone() for name, value in model.state_dict().items()}
    better, shares = errors_of_units(model, "w2a4", size, learner=learner)
    assert list(shares) == units
    assert max(shares.values()) < 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in better.parameters())


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_loss_brings_the_outputs_nearer(loss):
    _, shares = errors_of_units(tiny.conv().eval(), "w3a3", loss=loss)
    assert shares["4"] < 1.0


@pytest.mark.parametrize("learner", LEARNERS)
def test_what_is_left_are_weights_on_the_grids_of_plain_quantizers(learner):
    better = learned(tiny.vit(), size=16, learner=learner)
    taps = dict(taps_of(better))
    assert all(type(tap) is UniformQuantizer for tap in taps.values())
    if learner == "ste":
        return  # its latent weights are rounded to nearest, as after `Round`
    for name, tap in taps.items():
        if name.startswith("blocks") and name.endswith(".weight"):
            weight = better.get_submodule(name.rpartition(".")[0])._parameters["weight"]
            torch.testing.assert_close(fake_quantize(weight, tap.grid), weight, atol=1e-6, rtol=1e-5)


def test_the_first_and_the_last_layer_stay_as_they_were():
    model = tiny.vit()
    lines = []
    better = learned(model, size=16, log=lines.append)
    assert torch.equal(better.head.weight, model.head.weight)
    assert torch.equal(better.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert not torch.equal(better.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    units = [line for line in lines if line["event"] == "unit"]
    assert [line["unit"] for line in units] == ["blocks.0", "blocks.1"]
    assert all(line["after"] < line["before"] for line in units)


def test_at_8_bits_nothing_is_learned():
    model, lines = tiny.conv().eval(), []
    better = learned(model, "w8a8", log=lines.append)
    assert tiny.same(better, quantize(model, images(), "w8a8", BASE))
    assert [line["event"] for line in lines] == ["pass"] * 4


def test_rounding_of_one_layer_is_nearly_the_best_of_all():
    """The 1,024 roundings of a neuron, tried one by one: AdaRound's is far better than nearest, and near the best."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    x = [torch.randn(128, 3) @ torch.randn(3, 10)]  # correlated, so that errors can cancel
    options = {"learner": "adaround", "drop": 0.0, "iterations": 300, "batch": 64, "layers": 1}
    nearest, better = (
        quantize(model, x, "w3", [Calibrate(), Round(), *more]) for more in ([], [Reconstruct(**options)])
    )
    inputs = torch.relu(nearest[0](x[0]))  # the first layer has 8 bits in both
    weight, grid = model[2].weight.detach(), dict(taps_of(nearest))["2.weight"].grid

    def errors(rounded):
        return ((rounded - weight) @ inputs.T).square().sum(1)

    below = (weight / grid.scale).floor()
    choices = [torch.tensor(up) for up in itertools.product([0.0, 1.0], repeat=10)]
    best = torch.stack([errors((below + up).clamp(grid.qmin, grid.qmax) * grid.scale) for up in choices]).amin(0).sum()
    ours, theirs = errors(better[2].weight).sum(), errors(fake_quantize(weight, grid)).sum()
    assert best <= ours < 0.6 * theirs
    assert ours < best + 0.3 * (theirs - best)


def test_a_seed_decides_and_memory_does_not():
    model = tiny.conv()

    def run(**options):
        return learned(model, iterations=10, **options)

    assert tiny.same(run(seed=1), run(seed=1))
    assert tiny.same(run(seed=1), run(seed=1, memory=1e-9))
    assert not tiny.same(run(seed=1), run(seed=2))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), state)


class Loose(nn.Module):
    """A model whose middle layer sees two tensors that depend on the images, and that reads its images twice."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(64, 8), nn.Bilinear(8, 8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(self.mix(x, x))


def test_a_unit_that_cannot_run_alone_is_left_rounded_and_named():
    lines = []
    quantize(Loose(), images(), "w4a4", [Calibrate(), Round(), Reconstruct(**QUICK)], log=lines.append, allow=["mix"])
    notes = [line["text"] for line in lines if line["event"] == "note"]
    assert notes in ([], ["mix cannot be run alone: its weights are rounded to nearest"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learner": "x"}, "learned by 'x'"),
        ({"loss": "x"}, "loss of the reconstruction is 'x'"),
        ({"drop": 1.0}, "drop is 1.0"),
        ({"iterations": 0}, "iterations of a reconstruction is 0"),
        ({"joint": -1}, "joint is -1"),
        ({"cutmix": 1.5}, "cutmix is 1.5"),
        ({"batch": -1}, "batch of a reconstruction is -1"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(PlanishError, match=words):
        learned(tiny.conv(), **options)


def test_a_loss_that_is_not_finite_names_the_unit(monkeypatch):
    monkeypatch.setattr("planish.ptq.objectives.squared_error", lambda z, y: (z - y).sum() * float("nan"))
    with pytest.raises(PlanishError, match=r"4: the loss of its reconstruction is nan; give a smaller travel"):
        learned(tiny.conv())


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_unit_of_8_bit_weights_learns_the_steps_of_its_activations(learner):
    model = tiny.vit()
    better = learned(model, "w8a4", 16, learner=learner)
    rounded = dict(taps_of(quantize(model.eval(), images(16), "w8a4", BASE)))
    name = "blocks.0.mlp.fc1.input"
    assert dict(taps_of(better))[name].scale != rounded[name].scale
    assert torch.equal(better.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_pairs_are_learned_together():
    _, shares = errors_of_units(tiny.vit(), "w2a4", 16, joint=1)
    assert len(shares) == 2
    assert sum(" + " in name for name in shares) == 1
    assert max(shares.values()) < 0.9


def test_an_estimate_comes_before_the_first_unit_and_memory_is_a_bound_on_it():
    lines = []
    learned(tiny.vit(), size=16, log=lines.append, memory=1.0)
    kinds = [line["event"] for line in lines if line["pass"] == "reconstruct"]
    assert kinds == ["estimate", "unit", "unit", "pass"]
    estimate = next(line for line in lines if line["event"] == "estimate")
    assert estimate["units"] == 4
    assert estimate["seconds"] > 0
    # two inputs and the target of a block, and two outputs of the one before: 32 images, 5 tokens of 16 values
    assert estimate["megabytes"] == pytest.approx(5 * 32 * 5 * 16 * 4e-6)


def test_mixed_images_are_calibrated_on_beside_the_given_ones(monkeypatch):
    seen = []
    flow = reconstruction.Flow
    monkeypatch.setattr(reconstruction, "Flow", lambda *args: seen.append(flow(*args)) or seen[-1])
    learned(tiny.conv(), cutmix=0.75, iterations=2)
    assert seen[0].sizes == [16, 16, 16, 8]
    given = torch.cat(images())
    assert torch.equal(torch.cat(seen[0].batches[:2]), given)
    assert not torch.equal(seen[0].batches[2], given[:16])


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision(dtype, learner):
    model, batches = tiny.vit().eval().to(dtype), [batch.to(dtype) for batch in images(16)]
    quick = Reconstruct(learner=learner, **QUICK)
    log = []
    better = quantize(model, batches, "w2a4", [*BASE, quick], log=log.append)
    assert better(batches[0]).dtype == dtype
    units = [line for line in log if line["event"] == "unit"]
    assert len(units) == 2
    assert all(line["after"] < line["before"] for line in units)


def test_weights_with_groups_stay_as_they_were_rounded_and_the_log_says_so():
    scheme, log = Scheme("groups", Format(4, "group", group_size=4), Format(4, symmetric=False)), []
    plain = quantize(tiny.vit().eval(), images(16), scheme, BASE)
    better = quantize(tiny.vit().eval(), images(16), scheme, [*BASE, Reconstruct(**QUICK)], log=log.append)
    notes = [line["text"] for line in log if line["event"] == "note"]
    assert any("has a scale for each group of its inputs: it stays as it was rounded" in text for text in notes)
    ours, theirs = (dict(taps_of(one)) for one in (better, plain))
    groups = [name for name, tap in theirs.items() if tap.format.granularity == "group"]
    assert groups
    assert all(torch.equal(ours[name].grid.scale, theirs[name].grid.scale) for name in groups)
    scheme = replace(scheme, activations=None)
    weights_only = quantize(tiny.vit().eval(), images(16), scheme, [*BASE, Reconstruct(**QUICK)], log=log.append)
    assert torch.isfinite(weights_only(images(16)[0])).all()
    assert "has nothing to learn" in log[-2]["text"]


class Tied(nn.Module):
    """Two layers with one weight, between others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x.mean(1).mean(1)).relu()).relu()).relu())


def test_a_weight_that_two_layers_share_stays_as_it_was_rounded():
    log, model = [], Tied().eval()
    better = quantize(model, images(), "w2a4", [*BASE, Reconstruct(**QUICK)], log=log.append)
    texts = [line["text"] for line in log if line["event"] == "note"]
    assert any(text.startswith("a.weight is shared by several layers: it stays") for text in texts)
    plain = quantize(model, images(), "w2a4", BASE)
    assert torch.equal(better.a.weight, plain.a.weight)
    ours, theirs = (dict(taps_of(one)) for one in (better, plain))
    assert torch.equal(ours["a.weight"].grid.scale, theirs["a.weight"].grid.scale)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mid, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x, scale):
        return self.head(self.mid(self.conv(x).mean((2, 3))).relu() * scale[:, None])


def test_losses_of_the_whole_network_are_refused_where_it_has_several_inputs():
    batches = [{"x": batch, "scale": torch.ones(len(batch))} for batch in images()]
    quantize(Two().eval(), batches, "w2a4", [*BASE, Reconstruct(**QUICK)])
    with pytest.raises(PlanishError, match="this network has several inputs: take loss local"):
        quantize(Two().eval(), batches, "w2a4", [*BASE, Reconstruct(loss="glf", **QUICK)])


@pytest.mark.parametrize(
    "options", [{"travel": -1.0}, {"activation_travel": -0.5}, {"travel": float("nan")}, {"layers": 0}]
)
def test_options_that_mean_nothing(options):
    with pytest.raises(PlanishError, match=next(iter(options))):
        learned(tiny.conv(), **options)
