"""LayerNorm as RMSNorm, and the residual stream turned round: the same outputs, the stated structure."""

import copy

import pytest
import timm
import torch
from torch import nn

from planish.errors import PlanishError
from planish.network.hadamard import random_rotation
from planish.network.rebuilding import rebuild, rebuilt
from planish.network.residual import find_stream, plain_norms, rotate_stream

X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(name="vit_tiny_patch16_224", **options):
    """A small ViT whose parameters are all different from what they start at."""
    torch.manual_seed(0)
    small = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "in_chans": 1,
        "num_classes": 4,
    }
    model = timm.create_model(name, **{**small, **options}).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


VARIANTS = {
    "class token": {},
    "no biases, layer scale": {"qkv_bias": False, "init_values": 0.3},
    "average pool": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "norm, then average": {"global_pool": "avg", "fc_norm": False},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "queries and keys normalized": {"qk_norm": True},
    "norms in attention and mlp": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no projection biases": {"proj_bias": False},
}


def turned(model, rotation=None):
    stream = find_stream(model, X.to(model.head.weight.dtype))
    twin = copy.deepcopy(model)
    rotate_stream(twin, stream, random_rotation(24, torch.Generator().manual_seed(1)) if rotation is None else rotation)
    return twin, stream


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_outputs_stay_the_same(variant):
    model = vit(**VARIANTS[variant])
    twin, stream = turned(model)
    torch.testing.assert_close(twin(X), model(X), rtol=1e-4, atol=1e-4 * model(X).abs().max().item())
    exact, double = turned(model.double())[0], model.double()
    torch.testing.assert_close(exact(X.double()), double(X.double()), rtol=1e-9, atol=1e-9)
    for path, _ in stream.norms:
        norm = twin.get_submodule(path)
        assert type(norm) is nn.RMSNorm
        assert norm.weight is None
        assert norm.eps == model.get_submodule(path).eps
    assert not any(type(m).__name__ == "LayerScale" for m in twin.modules())


@torch.no_grad()
def test_the_stream_itself_is_turned_and_its_mean_is_gone():
    model, rotation = vit(init_values=0.3), random_rotation(24, torch.Generator().manual_seed(1))
    twin, _ = turned(model, rotation)
    seen = {}
    for key, m in (("before", model), ("after", twin)):
        m.blocks[1].register_forward_hook(lambda _m, _a, out, key=key: seen.update({key: out}))
        m(X)
    expected = (seen["before"] - seen["before"].mean(-1, keepdim=True)) @ rotation.float().T
    torch.testing.assert_close(seen["after"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_layer_after_a_norm_becomes():
    """The reference twin: W diag(gamma) R^T and b + W beta."""
    model, rotation = vit(), random_rotation(24, torch.Generator().manual_seed(1)).float()
    twin, _ = turned(model, rotation)
    for norm, layer in (
        ("blocks.0.norm1", "blocks.0.attn.qkv"),
        ("blocks.1.norm2", "blocks.1.mlp.fc1"),
        ("norm", "head"),
    ):
        norm, before, after = model.get_submodule(norm), model.get_submodule(layer), twin.get_submodule(layer)
        torch.testing.assert_close(
            after.weight, before.weight @ torch.diag(norm.weight) @ rotation.T, atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(after.bias, before.bias + before.weight @ norm.bias, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_an_outlier_channel_of_the_stream_is_spread():
    model = vit()
    model.blocks[0].mlp.fc2.weight[5] *= 100  # one channel of the stream
    twin, _ = turned(model)
    inputs = {}
    for key, m in (("before", model), ("after", twin)):
        m.blocks[1].attn.qkv.register_forward_pre_hook(lambda _m, args, key=key: inputs.update({key: args[0]}))
        m(X)

    def kurtosis(x):
        return ((x - x.mean()) ** 4).mean() / x.var() ** 2

    assert kurtosis(inputs["after"]) < 4 < kurtosis(inputs["before"])


def test_the_note_makes_the_same_modules():
    model = vit(**VARIANTS["no biases, layer scale"])
    twin, _ = turned(model)
    again = vit(**VARIANTS["no biases, layer scale"])
    rebuild(again, rebuilt(twin))
    assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in twin.named_modules()}
    assert [note["name"] for note in rebuilt(twin)] == ["rms-norm"]


def test_plain_norms_keep_width_epsilon_and_mode():
    model = nn.Sequential(nn.LayerNorm(5, eps=1e-3), nn.Linear(5, 5)).train()
    assert plain_norms(model, ["0"]) == ["0"]
    x = torch.randn(3, 5)
    torch.testing.assert_close(model[0](x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert model[0].training


def spoiled(change):
    model = vit()
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 4)), "no list of blocks"),
        (lambda: vit(pre_norm=True), "norm_pre before its first block"),
        (lambda: vit(global_pool="map", class_token=False), "one norm and linear heads"),
        (lambda: vit(num_classes=0), "one norm and linear heads"),
        (lambda: vit(final_norm=False), "one norm and linear heads"),
        (lambda: spoiled(lambda m: m.blocks.append(nn.Identity())), r"blocks\.2\.mlp\.fc2 is not a linear layer"),
        (
            lambda: spoiled(lambda m: setattr(m.blocks[1], "norm2", nn.RMSNorm(24))),
            r"blocks\.1\.norm2 is not a LayerNorm",
        ),
        (lambda: spoiled(lambda m: setattr(m, "norm", nn.RMSNorm(24))), "norm is no LayerNorm with weights"),
        (lambda: spoiled(lambda m: setattr(m.blocks[0], "ls1", nn.LayerNorm(24))), r"ls1 is not a layer scale"),
        (lambda: spoiled(lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(24))), "a norm before its first block"),
    ],
)
def test_models_that_it_does_not_fit_are_refused_with_the_reason(model, reason):
    with pytest.raises(PlanishError, match=reason):
        find_stream(model(), X)
