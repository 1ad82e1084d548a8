"""The reparameterized attention computes what timm's does, and shows its products to the taps."""

import copy

import pytest
import timm
import torch
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn

from planish.network import assign, attach, detach, ledger, watch
from planish.network.query_key import QueryKeyAttention, QueryKeyWindowAttention, reparameterize_query_key
from planish.ptq import quantize
from tests.network.zoo import build


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=3, in_chans=1,
        num_classes=4, **options,
    ).eval()  # fmt: skip


def attention(**options):
    torch.manual_seed(1)
    layer = Attention(12, num_heads=3, **options).double().eval()
    for p in layer.parameters():  # timm's biases are zero at first
        nn.init.normal_(p, std=0.7)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_it_computes_what_timm_does(bias, mask):
    layer = attention(qkv_bias=bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    seen = torch.rand(5, 5) > 0.4
    seen.fill_diagonal_(True)
    options = {
        "none": {}, "bool": {"attn_mask": seen}, "float": {"attn_mask": torch.randn(5, 5).double()},
        "causal": {"is_causal": True},
    }[mask]  # fmt: skip
    torch.testing.assert_close(QueryKeyAttention(layer)(x, **options), layer(x, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_windows_of_swin(bias, masked):
    torch.manual_seed(2)
    layer = WindowAttention(12, num_heads=3, window_size=(2, 3), qkv_bias=bias).double().eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.7)
    x = torch.randn(2 * 5, 6, 12, dtype=torch.float64)  # two images of five windows
    mask = torch.where(torch.rand(5, 6, 6) > 0.6, -100.0, 0.0).double() if masked else None
    torch.testing.assert_close(QueryKeyWindowAttention(layer)(x, mask), layer(x, mask), rtol=0, atol=1e-12)


def test_a_swin_keeps_its_state_and_its_outputs():
    model, x = build("swin")  # the second block of a stage has shifted windows, with a mask
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.relative_position_bias_table.normal_()
                module.qkv.bias.normal_()
    state, expected = {key: value.clone() for key, value in model.state_dict().items()}, model(x)
    assert len(reparameterize_query_key(model)) == 4
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    model.load_state_dict(state)
    assert not watch(model, x).unreachable


def test_gradients_of_the_latent_weights_are_the_same():
    layer = attention(qkv_bias=True)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    twin = QueryKeyAttention(copy.deepcopy(layer))
    for module in (layer, twin):
        module(x).square().sum().backward()
    torch.testing.assert_close(twin.qkv.weight.grad, layer.qkv.weight.grad, rtol=1e-9, atol=1e-10)
    ours, theirs = (m.qkv.bias.grad.chunk(3) for m in (twin, layer))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-10)
    assert theirs[1].abs().max() < 1e-10  # softmax cancels the key's bias


def test_under_autocast_the_product_is_that_of_float32():
    """Else some of its entries would be rounded otherwise in training than in evaluation."""
    rebuilt = QueryKeyAttention(attention()).float()
    with torch.autocast("cpu", torch.bfloat16):
        product = rebuilt.query_key_weight()
    assert product.dtype == torch.float32
    assert torch.equal(product, rebuilt.query_key_weight())


def test_rank_is_at_most_the_width_of_a_head():
    weight = QueryKeyAttention(attention(qkv_bias=True)).query_key_weight().unflatten(0, (3, 13))
    assert torch.linalg.matrix_rank(weight[:, :12]).max() == 4


def test_a_model_keeps_its_state_and_its_outputs():
    model = vit()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, 1, 16, 16)
    expected = model(x)
    assert reparameterize_query_key(model) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    model.load_state_dict(state)
    assert reparameterize_query_key(model) == []


def test_every_product_has_its_sites():
    model = vit()
    reparameterize_query_key(model)
    watched = watch(model, torch.randn(1, 1, 16, 16))
    assert not watched.unreachable
    mine = [p for p in watched.products if p.module == "blocks.0.attn"]
    assert [p.key for p in mine] == ["linear", "einsum", "linear1", "matmul"]
    assert [tuple(site.role for site in p.sites) for p in mine] == [
        ("input", "weight"), ("operand", "operand"), ("input", "weight"), ("operand", "operand")
    ]  # fmt: skip
    assert mine[0].weight.shape == (39, 12)
    assert mine[0].weight.channel_axis == 0
    plan = assign(watched, "w4a4")
    assert plan.formats[mine[0].weight.name].granularity == "channel"
    quantized = quantize(model, [torch.randn(4, 1, 16, 16)], "w4a4")
    assert "float" not in {row.bits for row in ledger(quantized).rows}
    assert torch.isfinite(quantized(torch.randn(2, 1, 16, 16))).all()


def test_taps_see_the_product_of_the_weights():
    model = vit()
    reparameterize_query_key(model)
    x = torch.randn(2, 1, 16, 16)
    expected = model(x)
    seen = {}

    class Keep(nn.Module):
        def __init__(self, site):
            super().__init__()
            self.site = site

        def forward(self, x):
            seen[self.site.name] = x.detach()
            return x

    attach(model, watch(model, x[:1]).products, Keep)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen["blocks.0.attn.linear_weight"], model.blocks[0].attn.query_key_weight())
    detach(model)
    assert type(model.blocks[0].attn) is QueryKeyAttention


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}])
def test_attentions_that_do_not_fit_are_left_alone(options):
    model = vit(**options)
    x = torch.randn(2, 1, 16, 16)
    expected = model(x)
    rebuilt = reparameterize_query_key(model)
    assert bool(rebuilt) == ("qk_norm" not in options)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_a_convolutional_network_has_none():
    assert reparameterize_query_key(nn.Sequential(nn.Conv2d(1, 2, 3))) == []
