"""A scale for each head: the grids, and the same answers from the file, the integers and ONNX Runtime."""

import copy

import pytest
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.deploy.integers import integer_model, integer_report
from planish.deploy.onnx.export import export
from planish.deploy.onnx.runtime import FLOAT
from planish.errors import PlanishError
from planish.functional import fake_quantize
from planish.models import Preprocessing
from planish.network import assign, attach, ledger, taps_of, watch
from planish.ptq import Calibrate, Round, quantize
from planish.ptq.heads import ScaleHeads
from planish.ptq.passes import Calibration, run_logits
from planish.ptq.reconstruction import Reconstruct
from planish.qat import QATSettings, train_quantized
from planish.quantizers import fit_grid
from planish.scheme import Scheme
from planish.training import TrainingSettings
from tests.ptq.test_repq import ARGUMENTS, X, vit

RECIPE = {"source": "timm", "architecture": "vit_tiny_patch16_224", "arguments": ARGUMENTS}
LOOK = Preprocessing((1, 16, 16), (0.5,), (0.5,), crop_pct=1.0)
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


def probabilities(model, block=0):
    """Of the network in float."""
    seen = {}
    plan = assign(watch(copy.deepcopy(model), X[:1]), "w4a4")
    work = Calibration(copy.deepcopy(model), [X], plan, run_logits(model, [X]))

    class Keep(nn.Module):
        def forward(self, x):
            seen["x"] = x
            return x

    attach(work.model, plan.products, lambda site: Keep() if site.name == SITE.format(block) else None)
    work.model(X)
    return seen["x"]


def test_each_head_has_the_grid_of_its_own_values(quantized):
    taps = dict(taps_of(quantized))
    x = probabilities(uneven())
    for name, tap in taps.items():
        assert tap.scale.shape == ((1, 2, 1, 1) if name.endswith("_probabilities") else tap.scale.shape)
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


def test_integers_and_the_file_give_the_same_answers(quantized, tmp_path):
    with torch.no_grad():
        expected = quantized(X)
        integers = integer_model(quantized)
        torch.testing.assert_close(integers(X), expected, rtol=1e-4, atol=1e-4)
    assert not integer_report(integers).in_float
    save(quantized, tmp_path / "heads.safetensors", recipe=RECIPE, preprocessing=LOOK)
    again = load(tmp_path / "heads.safetensors")
    with torch.no_grad():
        assert torch.equal(again(X), expected)
    assert again.planish_assignment.scheme.heads


def test_onnx_runtime_computes_every_product_in_integers(quantized, tmp_path):
    exported = export(quantized, tmp_path / "heads.onnx", images=[X], preprocessing=LOOK)
    assert not exported.in_float
    assert not {kernel for kernel in exported.kernels if kernel in FLOAT}
    products = {form.name: form.kernel for form in exported.forms}
    assert products["blocks.0.attn.attention_av"] == "MatMulInteger"
    assert exported.agreement.largest < 1e-4


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


def test_it_comes_before_the_ranges():
    with pytest.raises(PlanishError, match="scale-heads"):
        quantize(vit(), [X], "w4a4", [Calibrate(), ScaleHeads(), Round()])


def test_the_scheme_says_it():
    assert "a scale for each head's softmax" in Scheme("w4a4", *_formats(), heads=True).describe()


def _formats():
    scheme = Scheme.parse("w4a4")
    return scheme.weights, scheme.activations
