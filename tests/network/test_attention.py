"""The spelled-out attention against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.network import attach, attention, watch
from planish.network.attention import scaled_dot_product_attention


def multiply(operator, names, left, right):
    return left @ right


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def hide(share):
    """A boolean mask of five queries and seven keys; every query keeps a key."""
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < share
    mask[:, 0] = False
    return mask


MASKS = {
    "none": {},
    "bool": {"attn_mask": ~hide(0.3)},
    "float": {"attn_mask": draw(2, 1, 5, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "all": {"attn_mask": draw(5, 7), "scale": 1.7},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("wide", [4, 6])
def test_scaled_dot_product_attention(options, wide):
    query, key, value = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, wide)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value, **options, product=multiply), expected)


def test_a_query_that_may_see_nothing():
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    query, key, value = draw(2, 3, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(scaled_dot_product_attention(query, key, value, mask, product=multiply), expected)


def test_grouped_queries():
    query, key, value = draw(2, 6, 5, 4), draw(2, 3, 7, 4), draw(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    ours = scaled_dot_product_attention(query, key, value, enable_gqa=True, product=multiply)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    query, key, value = (draw(2, 3, 5, 4).to(dtype) + i for i in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, draw(5, 5).to(dtype))
    ours = scaled_dot_product_attention(query, key, value, draw(5, 5).to(dtype), product=multiply)
    torch.testing.assert_close(ours, expected, atol=0.02 if dtype == torch.bfloat16 else 1e-7, rtol=0.02)


def test_dropout_drops_the_probabilities():
    seen = {}

    def product(operator, names, left, right):
        seen[operator] = left
        return left @ right

    scaled_dot_product_attention(draw(9, 9, 9), draw(9, 9, 9), draw(9, 9, 9), dropout_p=0.5, product=product)
    assert 0.4 < (seen["attention_av"] == 0).float().mean() < 0.6


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
LAYERS = {
    "plain": ({}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "kdim": ({"kdim": 6, "vdim": 10}, {}),
    "kdim no bias": ({"kdim": 6, "vdim": 10, "bias": False}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero": ({"add_zero_attn": True}, {}),
    "everything": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDING}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "float padding": ({}, {"key_padding_mask": PADDING.float()}),
    "mask": ({}, {"attn_mask": hide(0.3)}),
    "float mask": ({"add_zero_attn": True}, {"attn_mask": draw(5, 7)}),
    "mask a head": ({"add_bias_kv": True}, {"attn_mask": draw(4, 5, 7)}),
    "both masks": ({}, {"attn_mask": hide(0.3), "key_padding_mask": PADDING}),
    "blind query": ({}, {"attn_mask": torch.arange(5)[:, None].expand(5, 7) == 2}),
    "blind query, no weights": ({}, {"attn_mask": torch.arange(5)[:, None].expand(5, 7) == 2, "need_weights": False}),
    "all heads": ({}, {"average_attn_weights": False}),
    "no weights": ({}, {"need_weights": False}),
}


class Identity(nn.Module):
    def forward(self, x):
        return x


def compare(layer, example):
    layer.eval()
    expected, expected_weights = layer(**example)  # with gradients: the plain path of PyTorch
    products = watch(layer, example).products
    assert {product.operator for product in products} == {"linear", "attention_qk", "attention_av"}
    attach(layer, products, lambda site: Identity())
    ours, weights = layer(**example)
    torch.testing.assert_close(ours, expected, equal_nan=True)  # a query that sees nothing is NaN in PyTorch, too
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, equal_nan=True)


def randomized(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return layer


@pytest.mark.parametrize(("options", "call"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("batched", [True, False])
def test_multihead_attention(options, call, batched):
    torch.manual_seed(0)
    layer = randomized(nn.MultiheadAttention(8, 2, **options))
    wide = options.get("kdim", 8), options.get("vdim", 8)
    example = {"query": draw(5, 2, 8), "key": draw(7, 2, wide[0]), "value": draw(7, 2, wide[1]), **call}
    if layer.batch_first:
        example = {name: tensor.transpose(0, 1) for name, tensor in example.items()}
    if not batched:
        example.update(
            {name: example[name].select(int(not layer.batch_first), 1) for name in ("query", "key", "value")}
        )
        if "key_padding_mask" in call:
            example["key_padding_mask"] = call["key_padding_mask"][1]
        if call.get("attn_mask", torch.zeros(0)).dim() == 3:
            example["attn_mask"] = call["attn_mask"][:2]
    compare(layer, example)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_causal(batch_first):
    torch.manual_seed(0)
    layer, x = randomized(nn.MultiheadAttention(8, 2, batch_first=batch_first)), draw(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5 if batch_first else 2)
    for call in ({"is_causal": True, "need_weights": False}, {"is_causal": True}, {}):
        compare(layer, {"query": x, "key": x, "value": x, "attn_mask": mask, **call})
        layer = randomized(nn.MultiheadAttention(8, 2, batch_first=batch_first))


def test_key_and_value_the_same_tensor_but_not_the_query():
    torch.manual_seed(0)
    memory = draw(7, 2, 8)
    compare(randomized(nn.MultiheadAttention(8, 2)), {"query": draw(5, 2, 8), "key": memory, "value": memory})


def test_static_keys_are_refused():
    with pytest.raises(NotImplementedError, match="static_k"):
        attention.multi_head_attention_forward(
            *[draw(3, 1, 4)] * 3, 4, 1, None, None, None, None, False, 0.0, draw(4, 4), None,
            static_k=draw(1, 3, 4), product=multiply,
        )  # fmt: skip
