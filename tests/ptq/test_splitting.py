"""Outlier channels in parts: the same network in float, narrower ranges, and the same answers from every file."""

import copy

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import taps_of
from planish.ptq import Calibrate, Round, SplitOutliers, quantize
from planish.ptq.passes import run_logits
from planish.ptq.rotate import Rotate
from planish.ptq.splitting import MOST
from tests.ptq.answers import same_answers
from tests.ptq.test_repq import X, vit, work_on

PASSES = [SplitOutliers(), Calibrate(), Round()]


def towering():
    """A ViT with a hidden channel of each block far above the others."""
    model = vit()
    for block in model.blocks:
        block.mlp.fc1.weight[5] *= 40
    return model


def test_the_number_of_parts_follows_the_largest_values():
    split = SplitOutliers(threshold=2.0)
    largest = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.1, 9.0, 1e9])
    assert split.parts(largest) == [(6, 2), (7, 5), (8, MOST)]
    assert split.parts(torch.zeros(4)) == []


@pytest.mark.parametrize("rotated", [False, True])
def test_the_network_in_float_stays_and_the_ranges_shrink(rotated):
    work, plain = work_on(towering()), work_on(towering())
    for step in [Rotate()] if rotated else []:
        step(work), step(plain)
    SplitOutliers()(work)
    before = torch.cat(run_logits(plain.model, [X]))
    torch.testing.assert_close(torch.cat(run_logits(work.model, [X])), before, rtol=1e-4, atol=1e-4)
    (note,) = [line["text"] for line in work.log if line.get("pass") == "split-outliers"]
    assert "behind the GELUs of 2 MLPs" in note
    Calibrate()(work), Calibrate()(plain)
    for name in ("blocks.0.mlp.fc2.input", "blocks.1.mlp.fc2.input"):
        assert dict(taps_of(work.model))[name].scale < dict(taps_of(plain.model))[name].scale


def test_rounding_hurts_less():
    model = towering()
    expected = torch.cat(run_logits(model, [X]))
    errors = [
        float((torch.cat(run_logits(quantize(model, [X], "w8a4", passes), [X])) - expected).square().mean())
        for passes in (PASSES[1:], PASSES)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_every_file_gives_the_same_answers(tmp_path):
    same_answers(quantize(towering(), [X], "w4a4", PASSES), tmp_path)


def test_nothing_stands_out():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    log, x = [], torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    given = copy.deepcopy(model)
    found = quantize(model, [x], "w4a4", PASSES, log=log.append)
    assert [line["text"] for line in log if line["event"] == "note"] == ["no channel behind a GELU stands out"]
    assert torch.equal(found(x), quantize(given, [x], "w4a4")(x))


def test_what_is_refused():
    with pytest.raises(PlanishError, match=r"threshold is 0\.5: give 1 or more"):
        SplitOutliers(threshold=0.5)
    with pytest.raises(PlanishError, match="split-outliers changes the network in float"):
        quantize(vit(), [X], "w4a4", [Calibrate(), SplitOutliers(), Round()])
