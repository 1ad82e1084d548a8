"""OFQ as a whole, and what its options switch."""

import pytest
import timm
import torch

from planish.cli.main import _parse
from planish.deploy.checkpoint import load, save
from planish.network import ledger, taps_of
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.ofq import OFQ, RECIPES
from planish.qat.options import with_options
from planish.quantizers import ShiftedQuantizer
from planish.recipes.arms import training_settings
from tests.families import SWIN
from tests.training import tiny

SETTINGS = QATSettings(averaging=None, training=tiny.settings(epochs=1, optimizer="adamw", lr=0.003))


@pytest.mark.parametrize(("make", "size"), [(tiny.conv, 8), (tiny.vit, 16)])
@pytest.mark.parametrize("per_token", [False, True])
def test_it_trains_and_its_scales_are_baked(make, size, per_token):
    trained = train_quantized(make(), tiny.loader(size=size), "w2a2", OFQ(per_token=per_token), settings=SETTINGS)
    x = torch.randn(5, 1, size, size)
    assert torch.isfinite(trained(x)).all()
    assert torch.equal(trained(x), trained(x))
    taps = dict(taps_of(trained))
    assert any(isinstance(tap, ShiftedQuantizer) for tap in taps.values())
    rows = {row.site: row for row in ledger(trained).rows}
    if make is tiny.vit:
        assert rows["blocks.0.attn.linear_weight"].bits == 2
        assert rows["blocks.0.attn.linear_weight"].operator == "linear"
        assert (rows["blocks.0.mlp.fc1.input"].granularity == "token") == per_token
        assert rows["patch_embed.proj.input"].granularity == "tensor"
        assert rows["head.input"].granularity == "tensor"
        assert not any("attention_qk" in site for site in rows)


def test_options():
    plain = train_quantized(
        tiny.vit(), tiny.loader(size=16), "w2a2", OFQ(query_key=False, annealing=0.0), settings=SETTINGS
    )
    assert any("attention_qk" in name for name, _ in taps_of(plain))


def test_switched_off_it_is_its_base():
    off = OFQ(query_key=False, annealing=0.0, weights="lsq", activations="lsq", distillation=0.0)
    batches = tiny.loader()
    assert tiny.same(
        train_quantized(tiny.conv(), batches, "w4a4", off, settings=SETTINGS),
        train_quantized(tiny.conv(), batches, "w4a4", Method(), settings=SETTINGS),
    )


def test_the_float_start_is_exact():
    """Rebuilt, and before any rounding, it is the given network."""
    from planish.network import reparameterize_query_key

    model, rebuilt = tiny.vit(), tiny.vit()
    reparameterize_query_key(rebuilt)
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(rebuilt(x), model(x), atol=1e-5, rtol=1e-4)


def test_swin_has_one_weight_for_query_and_key_and_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    recipe = {"architecture": "swin_tiny_patch4_window7_224", "arguments": {**SWIN, "in_chans": 1, "num_classes": 4}}
    model = timm.create_model(recipe["architecture"], **recipe["arguments"])
    method = OFQ(per_token=True, annealing=0.25)
    trained = train_quantized(model, tiny.loader(size=32), "w2a2", method, settings=SETTINGS)
    rows = {row.site: row for row in ledger(trained).rows}
    assert rows["layers.0.blocks.0.attn.linear_weight"].bits == 2
    assert not any("attention_qk" in site for site in rows)
    x = torch.randn(3, 1, 32, 32)
    save(trained, tmp_path / "swin.safetensors", recipe={"source": "timm", **recipe})
    assert torch.equal(load(tmp_path / "swin.safetensors")(x), trained(x))


@pytest.mark.parametrize("network", RECIPES)
def test_recipes_are_what_the_command_line_reads(network):
    recipe = RECIPES[network]
    command = _parse(["train", "vit", "--method", "ofq", *recipe.command_line.split()])
    training = training_settings(command.train, recipe.training.seed)
    for name in ("lr", "weight_decay", "warmup", "final_lr"):
        assert getattr(training, name) == pytest.approx(getattr(recipe.training, name), rel=1e-3)
    assert (training.epochs, training.optimizer) == (330, "adamw")
    assert command.models.batch_size == recipe.batch_size
    method = with_options(OFQ(), (text for texts in command.option for text in texts))
    assert (method.per_token, method.annealing) == (True, pytest.approx(30 / 330, rel=1e-3))


def test_a_recipe_warms_up_for_five_epochs_and_ends_at_its_rate():
    training, steps = RECIPES["DeiT-T"].training, 330 * 100
    rates = [training.learning_rate(step, steps, training.lr) for step in (499, 500, steps)]
    assert rates == pytest.approx([5.47e-4, 5.47e-4, 1e-5], rel=1e-6)
    assert RECIPES["DeiT-S"].training.learning_rate(0, steps, 3.2e-4) == pytest.approx(3.2e-4)
