"""No product is left out silently; the edges get their own bits."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network import assign, ledger, watch
from planish.network.batches import first_image
from planish.ptq import quantize
from planish.scheme import Scheme
from tests.network.zoo import build


class Around(nn.Module):
    """A linear layer, then something else on its output."""

    def __init__(self, inner):
        super().__init__()
        self.head, self.inner = nn.Linear(6, 6), inner

    def forward(self, x):
        return self.inner(self.head(x))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Pair(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


class Cell(nn.LSTMCell):
    def __init__(self):
        super().__init__(6, 4)

    def forward(self, x):
        return super().forward(x[:, 0])


UNREACHABLE = {
    "lstm": lambda: nn.LSTM(6, 4, batch_first=True),
    "gru": lambda: nn.GRU(6, 4, batch_first=True),
    "bilinear": lambda: Pair(6, 6, 3),
    "cdist": lambda: Function(lambda x: torch.cdist(x, x)),
    "cdist_mm": lambda: Function(lambda x: torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist")),
    "tensordot": lambda: Function(lambda x: torch.tensordot(x, x, dims=([0, 1], [0, 1]))),
    "chain": lambda: Function(lambda x: torch.chain_matmul(x[0], x[0].T, x[0])),
    "multi_dot": lambda: Function(lambda x: torch.linalg.multi_dot([x[0], x[0].T, x[0]])),
    "dot": lambda: Function(lambda x: torch.dot(x[0, 0], x[0, 1])),
    "inner": lambda: Function(lambda x: torch.inner(x, x)),
    "lstm_cell": Cell,
}


@pytest.mark.parametrize("kind", sorted(UNREACHABLE))
def test_a_product_that_no_tap_reaches_is_an_error_that_names_it(kind):
    watched = watch(Around(UNREACHABLE[kind]()), torch.randn(2, 5, 6))
    with pytest.raises(PlanishError, match=r"inner: aten::.* no tap can reach .*allow=\('inner',\)"):
        assign(watched, "w4a4")
    plan = assign(watched, "w4a4", allow=("inner",))
    assert {p.module for p in plan.allowed} == {"inner"}
    assert [site.name for site, _ in plan.quantized()] == ["head.input", "head.weight"]


def test_a_product_of_the_root_itself_is_named():
    watched = watch(Function(lambda x: torch.tensordot(x, x, dims=2)), torch.randn(2, 5, 6)[0])
    with pytest.raises(PlanishError, match="the model itself: aten::"):
        assign(watched, "w4a4")
    assert assign(watched, "w4a4", allow=watched.unreachable[0].name).allowed


def test_allow_takes_patterns_and_refuses_those_that_match_nothing():
    watched = watch(*build("vit_gray_28"))
    plan = assign(watched, "w4a4", allow="blocks.*.attn*")
    left = {name for name, fmt in plan.formats.items() if fmt is None}
    assert left
    assert all(".attn" in name for name in left)
    with pytest.raises(PlanishError, match=r"allow='blocks\.7\.attn' matches no matrix product of this model"):
        assign(watched, "w4a4", allow=("blocks.7.attn",))


def test_first_and_last_layer_get_the_edge_bits():
    watched = watch(*build("vit_gray_28"))
    formats = assign(watched, "w3a4").formats
    edges = {"patch_embed.proj.weight", "patch_embed.proj.input", "head.weight", "head.input"}
    assert {name for name, fmt in formats.items() if fmt.bits == 8} == edges
    assert {fmt.bits for name, fmt in formats.items() if name.endswith("weight") and name not in edges} == {3}
    assert formats["blocks.0.attn.attention_av_probabilities"].bits == 4


def test_weights_only_leaves_every_activation_in_float():
    formats = assign(watch(*build("test_resnet")), "w3").formats
    assert all((fmt is None) != name.endswith("weight") for name, fmt in formats.items())


def test_a_tied_weight_is_quantized_once():
    plan = assign(watch(*build("twice")), "w4a4")
    assert [s.name for s, _ in plan.quantized()].count("body.weight") == 1


def by_token(name="w4a4"):
    scheme = Scheme.parse(name)
    return replace(scheme, activations=replace(scheme.activations, granularity="token"))


def per_token(model, example):
    formats = assign(watch(model, first_image(example)), by_token()).formats
    return {name for name, fmt in formats.items() if fmt and fmt.granularity == "token"}


def test_tokens_get_a_scale_each_where_dimension_minus_two_holds_them():
    found = per_token(*build("vit_gray_28"))
    block = {"attn.qkv.input", "attn.proj.input", "mlp.fc1.input", "mlp.fc2.input", "attn.attention_qk_query",
             "attn.attention_av_probabilities", "attn.attention_av_value"}  # fmt: skip
    # not the key, which the product takes as (features, tokens), nor the image, nor the pooled features
    assert found == {f"blocks.{i}.{name}" for i in (0, 1) for name in block}


@pytest.mark.parametrize("name", ["convolutions", "twice", "test_resnet"])
def test_images_and_pooled_features_get_one_scale(name):
    assert per_token(*build(name)) == set()


def test_a_sequence_first_layer_gets_one_scale():
    found = per_token(*build("torchvision_vit"))
    assert not any(name.endswith("self_attention.linear_input") for name in found)
    assert any(name.endswith("attention_qk_query") for name in found)


@pytest.mark.parametrize("name", ["vit_gray_28", "torchvision_vit", "encoder", "convolutions", "swin"])
def test_a_scale_for_each_token_survives_another_batch_size(name):
    model, example = build(name)
    quantized = quantize(model, [example], by_token())
    more = torch.cat([example, example[:1]])
    with torch.no_grad():
        torch.testing.assert_close(quantized(more)[:2], quantized(example), atol=1e-4, rtol=1e-4)


def test_a_vector_gets_one_scale():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return x @ self.v

    formats = assign(watch(Vector(), torch.randn(4, 6)), Scheme.parse("w4a4")).formats
    assert formats["v"].granularity == "tensor"


def overridden(model, example, *overrides, scheme="w4a4", **options):
    return assign(watch(model, first_image(example)), replace(Scheme.parse(scheme), overrides=overrides), **options)


def test_an_override_goes_before_the_scheme_and_the_edge_bits():
    model, example = build("vit_gray_28")
    before = assign(watch(model, first_image(example)), "w4a4").formats
    changes = {
        "head.linear": "w2a6", "blocks.0.mlp.fc1.linear": "w3", "blocks.1.attn.attention_qk": "a8",
        "blocks.1.mlp.fc2.linear": "w2a4",
    }  # fmt: skip
    after = overridden(model, example, *changes.items()).formats
    bits = {name: fmt and fmt.bits for name, fmt in after.items() if fmt != before[name]}
    assert bits == {
        "head.weight": 2, "head.input": 6, "blocks.0.mlp.fc1.weight": 3, "blocks.0.mlp.fc1.input": None,
        "blocks.1.attn.attention_qk_query": 8, "blocks.1.attn.attention_qk_key": 8, "blocks.1.mlp.fc2.weight": 2,
    }  # fmt: skip
    assert (
        after["blocks.1.mlp.fc2.weight"]
        == assign(watch(model, first_image(example)), "w2a4").formats["blocks.1.mlp.fc2.weight"]
    )
    assert list(overridden(model, example, *changes.items()).quantized())
    row = {row.site: row.bits for row in ledger(model, overridden(model, example, *changes.items()).scheme).rows}
    assert row["head.weight"] == 2
    assert row["blocks.0.mlp.fc1.input"] is None


def test_an_override_decides_for_a_tensor_that_another_product_shares():
    model, example = build("twice")
    for name in ("body.linear", "tied.linear"):
        assert overridden(model, example, (name, "w3a4")).formats["body.weight"].bits == 3
    with pytest.raises(
        PlanishError, match=r"body\.linear and tied\.linear give the tensor body\.weight, .* 3 and 2 bits"
    ):
        overridden(model, example, ("body.linear", "w3a4"), ("tied.linear", "w2a4"))


@pytest.mark.parametrize(
    ("override", "match"),
    [
        (("head", "w3a4"), r"override 'w3a4' of 'head' names no matrix product of this model; its products are patch_"),
        (("blocks.*.linear", "w3a4"), "names no matrix product"),
        (("head.linear", "a4"), r"'a4' of head\.linear does not fit: the product has a weight, so write w4a4"),
        (("blocks.0.attn.attention_qk", "w3a5"), r"does not fit: the product has no weight, so write a5"),
        (("blocks.0.mlp.fc1.linear", "w3a4"), r"left in float by allow: drop one of the two"),
    ],
)
def test_overrides_that_cannot_be_followed(override, match):
    with pytest.raises(PlanishError, match=match):
        overridden(*build("vit_gray_28"), override, allow=("blocks.0.mlp*",))


def test_tokens_keep_scales_of_their_own_at_other_widths():
    model, example = build("vit_gray_28")
    scheme = replace(by_token(), overrides=(("blocks.0.mlp.fc1.linear", "w4a6"), ("head.linear", "w4a6")))
    formats = assign(watch(model, first_image(example)), scheme).formats
    assert (formats["blocks.0.mlp.fc1.input"].bits, formats["blocks.0.mlp.fc1.input"].granularity) == (6, "token")
    assert (formats["head.input"].bits, formats["head.input"].granularity) == (6, "tensor")


def test_heads_have_scales_of_their_own_if_the_scheme_says_so():
    model, example = build("vit_gray_28")
    watched = watch(model, first_image(example))
    formats = assign(watched, replace(Scheme.parse("w4a4"), heads=True)).formats
    own = {name for name, fmt in formats.items() if fmt.granularity == "channel" and not name.endswith("weight")}
    assert own == {name for name in formats if name.endswith("attention_av_probabilities")}
    assert own
    axes = {site.channel_axis for site in watched.sites if site.name in own}
    assert axes == {1}
    assert "tensor" in {fmt.granularity for name, fmt in formats.items() if name.endswith("_query")}
    assert not [
        name for name, fmt in assign(watched, "w4a4").formats.items() if name in own and fmt.granularity != "tensor"
    ]
