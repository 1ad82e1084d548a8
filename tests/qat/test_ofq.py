"""OFQ as a whole, and what its options switch."""

import pytest
import torch

from planish.network import ledger, taps_of
from planish.qat import Method, QATSettings, train_quantized
from planish.qat.ofq import OFQ, RECIPES
from planish.quantizers import ShiftedQuantizer
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


def test_recipes_are_complete():
    for recipe in RECIPES.values():
        assert {"epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "mixup"} <= set(recipe)
