"""Rows of the softmax output in units of their largest value: less error, and the same answers from every file."""

import pytest
import torch
from torch import nn

from planish.deploy.checkpoint import load, save
from planish.deploy.onnx.runtime import FLOAT
from planish.errors import PlanishError
from planish.network import attach, ledger, taps_of
from planish.network.rows import divides_rows
from planish.ptq import Calibrate, Round, ScaleRows, quantize
from planish.ptq.passes import run_logits
from planish.ptq.reconstruction import Reconstruct
from planish.qat import QATSettings, train_quantized
from planish.training import TrainingSettings
from tests.ptq.answers import LOOK, RECIPE, same_answers
from tests.ptq.test_heads import SITE, uneven
from tests.ptq.test_repq import X, vit, work_on

PASSES = [ScaleRows(), Calibrate(), Round()]


@pytest.fixture(scope="module")
def quantized():
    return quantize(uneven(), [X], "w4a4", PASSES)


def test_the_grid_reaches_from_zero_to_one(quantized):
    even = vit()
    for block in even.blocks:
        block.attn.qkv.weight.mul_(0.1)  # no row looks at one place alone
    plain, rows = (quantize(even, [X], "w4a4", passes) for passes in (PASSES[1:], PASSES))
    for found, least, most in ((quantized, 0.9, 1.001), (rows, 0.9, 1.001), (plain, 0.0, 0.5)):
        for block in (0, 1):
            grid = dict(taps_of(found))[SITE.format(block)].grid
            assert grid.zero_point == 0
            assert least <= float(grid.scale) * 15 <= most
    assert "scale-rows" in str(ledger(quantized))


def test_the_network_in_float_stays():
    work = work_on(uneven())
    ScaleRows()(work)
    assert all(divides_rows(block.attn) for block in work.model.blocks)
    expected = run_logits(work.model, [X])  # PyTorch's kernels; with taps the products are spelled out
    attach(work.model, work.assignment.products, lambda site: nn.Identity())
    torch.testing.assert_close(run_logits(work.model, [X]), expected)
    torch.testing.assert_close(expected, run_logits(uneven(), [X]))


def test_rounding_the_probabilities_hurts_less():
    """With heads as different as these, and nothing else rounded (the error is that of the reference below, too)."""
    model = uneven()
    expected = torch.cat(run_logits(model, [X]))
    errors = []
    for passes in (PASSES[1:], PASSES):
        found = quantize(model, [X], "w8a4", passes)
        for name, tap in taps_of(found):
            if not name.endswith("_probabilities"):
                tap.__dict__["forward"] = lambda x: x
        errors.append(float((torch.cat(run_logits(found, [X])) - expected).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_the_reference_twin():
    """Attention written out, its probabilities rounded by PyTorch's own operator in units of each row's largest."""
    found = quantize(uneven(), [X], "w8a4", PASSES)
    taps = dict(taps_of(found))
    for name, tap in taps.items():
        if not name.endswith("_probabilities"):
            tap.__dict__["forward"] = lambda x: x
    attention = uneven().blocks[0].attn
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.qkv(x).reshape(3, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
    p = (q @ k.transpose(-2, -1) * attention.scale).softmax(-1)
    peak = p.amax(-1, keepdim=True)
    grid = taps[SITE.format(0)].grid
    rows = torch.fake_quantize_per_tensor_affine(p / peak, float(grid.scale), int(grid.zero_point), 0, 15)
    expected = attention.proj((rows @ v * peak).transpose(1, 2).flatten(2))
    with torch.no_grad():
        torch.testing.assert_close(found.blocks[0].attn(x), expected)


def test_every_file_gives_the_same_answers(quantized, tmp_path):
    loaded, exported = same_answers(quantized, tmp_path)
    assert divides_rows(loaded.blocks[0].attn)
    assert not {kernel for kernel in exported.kernels if kernel in FLOAT}
    products = {form.name: form.kernel for form in exported.forms}
    # with one scale; heads that have scales of their own need MatMulInteger
    assert products["blocks.0.attn.attention_av"] == "MatMulIntegerToFloat"


def test_reconstruction_and_training_keep_it(tmp_path):
    rebuilt = quantize(uneven(), [X], "w4a4", [*PASSES, Reconstruct(iterations=4, batch=4)])
    assert divides_rows(rebuilt.blocks[1].attn)
    batches = [(X, torch.arange(6) % 4)] * 2
    settings = QATSettings(training=TrainingSettings(epochs=1))
    trained = train_quantized(rebuilt, batches, "w4a4", "lsq", settings=settings)
    assert divides_rows(trained.blocks[1].attn)
    save(trained, tmp_path / "q.safetensors", recipe=RECIPE, preprocessing=LOOK)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q.safetensors")(X), trained.eval()(X))


def test_without_attention_nothing_changes():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    log = []
    asked = quantize(net, [x], "w4a4", PASSES, log=log.append)
    assert torch.equal(quantize(net, [x], "w4a4")(x), asked(x))
    notes = [line["text"] for line in log if line["event"] == "note"]
    assert notes == ["no attention with a quantized softmax output was found"]


def test_attention_in_float_is_left_alone():
    log = []
    found = quantize(vit(), [X], "w4", PASSES, log=log.append)
    assert not any(divides_rows(module) for module in found.modules())
    plain = quantize(vit(), [X], "w4", PASSES[1:])
    assert torch.equal(torch.cat(run_logits(found, [X])), torch.cat(run_logits(plain, [X])))
    assert [line["text"] for line in log if line["event"] == "note"] == [
        "no attention with a quantized softmax output was found"
    ]


def test_it_comes_before_the_ranges():
    with pytest.raises(PlanishError, match="scale-rows"):
        quantize(vit(), [X], "w4a4", [Calibrate(), ScaleRows(), Round()])
