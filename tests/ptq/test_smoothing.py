"""Factors behind a GELU: the same network in float, SmoothQuant's factors, the same answers from every file."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import taps_of
from planish.network.hidden import Smoothed
from planish.network.mlps import find_mlps
from planish.ptq import Calibrate, Round, SmoothHidden, SplitOutliers, quantize
from planish.ptq.passes import run_logits
from planish.ptq.relu import ReplaceGELU
from tests.ptq.answers import same_answers
from tests.ptq.test_repq import X, vit, work_on
from tests.ptq.test_splitting import towering

PASSES = [SmoothHidden(), Calibrate(), Round()]


def test_the_network_in_float_stays_and_the_ranges_shrink():
    work, plain = work_on(towering()), work_on(towering())
    SmoothHidden()(work)
    before = torch.cat(run_logits(plain.model, [X]))
    torch.testing.assert_close(torch.cat(run_logits(work.model, [X])), before, rtol=1e-4, atol=1e-4)
    assert isinstance(work.model.blocks[1].mlp.act, Smoothed)
    Calibrate()(work), Calibrate()(plain)
    for name in ("blocks.0.mlp.fc2.input", "blocks.1.mlp.fc2.input"):
        assert dict(taps_of(work.model))[name].scale < dict(taps_of(plain.model))[name].scale


def test_the_factors_written_out():
    """Channels divided by (largest / median) ** strength, weights multiplied; a median of 0 leaves them alone."""
    largest = torch.tensor([1.0, 4.0, 0.0, 2.0, 64.0])
    expected = torch.tensor([0.5**0.5, 2**0.5, 0.1, 1.0, 3**0.5])
    torch.testing.assert_close(SmoothHidden(strength=0.5).factors(largest), expected)
    assert torch.equal(SmoothHidden().factors(torch.tensor([0.0, 0.0, 3.0])), torch.ones(3))
    model, seen = towering(), []
    work = work_on(copy.deepcopy(model))
    SmoothHidden(strength=0.5, most=2.0)(work)
    layer = model.blocks[1].mlp.fc2
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).abs().amax(0)))
    run_logits(model, [X])
    assert seen[0].max() > 2 * seen[0].median()
    factors = (seen[0] / seen[0].median()).clamp(max=2) ** 0.5
    torch.testing.assert_close(work.model.blocks[1].mlp.act.factors, 1 / factors)
    torch.testing.assert_close(work.model.blocks[1].mlp.fc2.weight, layer.weight * factors)


def test_rounding_hurts_less():
    model, passes = towering(), [SmoothHidden(most=1e6), *PASSES[1:]]
    expected = torch.cat(run_logits(model, [X]))
    errors = [
        float((torch.cat(run_logits(quantize(model, [X], "w8a4", passes), [X])) - expected).square().mean())
        for passes in (PASSES[1:], passes)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_what_still_stands_out_is_split(tmp_path):
    model = towering()
    for block in model.blocks:
        block.mlp.fc1.weight[5] *= 10
    log = []
    found = quantize(model, [X], "w4a4", [SmoothHidden(), SplitOutliers(), *PASSES[1:]], log=log.append)
    assert [line["pass"] for line in log if line["event"] == "note"] == ["split-outliers"]
    assert isinstance(found.blocks[0].mlp.act[0], Smoothed)
    same_answers(found, tmp_path)


def test_every_file_gives_the_same_answers(tmp_path):
    same_answers(quantize(towering(), [X], "w4a4", PASSES), tmp_path)


def test_without_mlps_nothing_changes():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    log = []
    found = quantize(net, [x], "w4a4", PASSES, log=log.append)
    notes = [line["text"] for line in log if line["event"] == "note"]
    assert notes == ["no GELU was found right in front of a linear layer with quantized inputs"]
    assert torch.equal(found(x), quantize(net, [x], "w4a4")(x))


def test_a_channel_that_is_always_zero():
    model = towering()
    for block in model.blocks:
        block.mlp.fc1.weight[7] = 0
        block.mlp.fc1.bias[7] = 0
    work = work_on(model)
    SmoothHidden(strength=1.0)(work)
    assert all(block.mlp.act.factors.isfinite().all() for block in work.model.blocks)


class Readers(nn.Module):
    """The hidden values of `one` are read by its second layer alone, those of `two` by something else as well."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.first, self.act, self.second = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)

    def forward(self, x):
        hidden = self.act(self.first(self.one(x)))
        return self.second(hidden) + hidden.square().sum(-1, keepdim=True)


@pytest.mark.parametrize("step", [SmoothHidden(strength=1.0), SplitOutliers(threshold=1.0)])
def test_an_mlp_whose_hidden_values_something_else_reads_is_left_alone(step):
    torch.manual_seed(0)
    model, x = Readers().eval().requires_grad_(False), torch.randn(12, 8)
    work = work_on(copy.deepcopy(model), x)
    step(work)
    torch.testing.assert_close(work.model(x), model(x))
    assert isinstance(work.model.act, nn.GELU)
    assert not isinstance(work.model.one[1], nn.GELU)
    texts = [line["text"] for line in work.log if "act changes the outputs by" in line.get("text", "")]
    assert len(texts) == 1


def test_a_weight_that_layers_share_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    model[5].weight = model[2].weight
    work = work_on(model.eval(), torch.randn(8, 4))
    SmoothHidden(strength=0.5)(work)
    assert not any(isinstance(module, Smoothed) for module in work.model.modules())


def test_a_relu_takes_no_smoothed_gelu():
    """It would drop the factors."""
    work = work_on(towering())
    SmoothHidden(strength=0.5)(work)
    assert find_mlps(work.model, X[:1]) == []
    assert len(find_mlps(work.model, X[:1], (Smoothed,))) == 2
    ReplaceGELU()(work)
    assert isinstance(work.model.blocks[0].mlp.act, Smoothed)


def test_what_is_refused():
    for strength in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(PlanishError, match=r"strength is .*: give a power above 0, at most 1"):
            SmoothHidden(strength=strength)
    with pytest.raises(PlanishError, match=r"most is 0\.5: give 1 or more"):
        SmoothHidden(most=0.5)
    with pytest.raises(PlanishError, match="smooth-hidden changes the network in float"):
        quantize(vit(), [X], "w4a4", [Calibrate(), SmoothHidden(), Round()])
