"""A scale for each head: the grids, and the same answers from the file, the integers and ONNX Runtime."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.deploy.onnx.runtime import FLOAT
from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.network import assign, ledger, taps_of, watch
from planish.ptq import Calibrate, Calibration, Round, ScaleHeads, quantize
from planish.ptq.reconstruction import Reconstruct
from planish.ptq.rounding import catch
from planish.qat import QATSettings, train_quantized
from planish.quantizers import fit_grid
from planish.scheme import Scheme
from planish.training import TrainingSettings
from tests.ptq.answers import same_answers
from tests.ptq.test_repq import X, vit

SITE = "blocks.{}.attn.attention_av_probabilities"


def uneven():
    """A ViT with a head that looks at one place and one that looks everywhere."""
    model = vit()
    for block in model.blocks:
        block.attn.qkv.weight[:12] *= 30  # the queries of the first head
        block.attn.qkv.weight[12:24] *= 0.1
    return model


@pytest.fixture(scope="module")
def quantized():
    return quantize(uneven(), [X], "w4a4", [ScaleHeads(), Calibrate(), Round()])


def probabilities(model):
    """Of the first block of the network in float."""
    (found,) = catch(model, watch(model, X[:1]).products, [SITE.format(0)], X).values()
    return found


def test_each_head_has_the_grid_of_its_own_values(quantized):
    taps = dict(taps_of(quantized))
    x = probabilities(uneven())
    apart = {name for name, tap in taps.items() if tap.scale.shape == (1, 2, 1, 1)}
    assert apart == {name for name in taps if name.endswith("_probabilities")}
    tap = taps[SITE.format(0)]
    for head in (0, 1):
        alone = fit_grid(x[:, head], Scheme.parse("w4a4").activations)
        assert float(tap.scale[0, head]) == pytest.approx(float(alone.scale), rel=0.05)
    assert tap.scale[0, 0] > 2 * tap.scale[0, 1]
    rows = {row.site: row.granularity for row in ledger(quantized).rows}
    assert rows[SITE.format(0)] == "channel"
    assert rows["blocks.0.attn.attention_av_value"] == "tensor"


def test_the_error_of_the_rows_is_less_than_with_one_scale(quantized):
    x = probabilities(uneven())
    one = fit_grid(x, Scheme.parse("w4a4").activations)
    apart = dict(taps_of(quantized))[SITE.format(0)]
    assert (apart(x) - x).square().sum() < 0.7 * (fake_quantize(x, one) - x).square().sum()


def test_every_file_gives_the_same_answers(quantized, tmp_path):
    loaded, exported = same_answers(quantized, tmp_path)
    assert loaded.planish_assignment.scheme.heads
    assert not {kernel for kernel in exported.kernels if kernel in FLOAT}
    products = {form.name: form.kernel for form in exported.forms}
    assert products["blocks.0.attn.attention_av"] == "MatMulInteger"


def test_reconstruction_and_training_learn_a_step_for_each_head():
    passes = [ScaleHeads(), Calibrate(), Round(), Reconstruct(iterations=4, batch=4)]
    rebuilt = quantize(uneven(), [X], "w4a4", passes)
    assert dict(taps_of(rebuilt))[SITE.format(1)].scale.shape == (1, 2, 1, 1)
    batches = [(X, torch.arange(6) % 4)] * 2
    settings = QATSettings(training=TrainingSettings(epochs=1))
    trained = train_quantized(rebuilt, batches, "w4a4", "lsq", settings=settings)
    assert dict(taps_of(trained))[SITE.format(1)].scale.shape == (1, 2, 1, 1)


def test_without_heads_nothing_changes():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    log = []
    plain = quantize(net, [x], "w4a4")
    asked = quantize(net, [x], "w4a4", [ScaleHeads(), Calibrate(), Round()], log=log.append)
    assert torch.equal(plain(x), asked(x))
    notes = [line["text"] for line in log if line["event"] == "note"]
    assert notes == ["no attention with heads and a quantized softmax output was found"]
    work = Calibration(net, [x], assign(watch(net, x[:1]), "w4a4"), [])
    ScaleHeads()(work)
    assert not work.assignment.scheme.heads  # so that no card speaks of heads


def test_it_comes_before_the_ranges():
    with pytest.raises(PlanishError, match="scale-heads"):
        quantize(vit(), [X], "w4a4", [Calibrate(), ScaleHeads(), Round()])


def test_the_scheme_says_it():
    assert "a scale for each head's softmax" in replace(Scheme.parse("w4a4"), heads=True).describe()
