"""Which linear layers read a LayerNorm, and nobody else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planish.network.norm_readers import find_norm_readers
from tests.network.zoo import build


class Net(nn.Module):
    """A norm, two linear layers, and a function in between."""

    def __init__(self, function, affine=True):
        super().__init__()
        self.norm, self.a, self.b = (
            nn.LayerNorm(6, elementwise_affine=affine),
            nn.Linear(6, 6),
            nn.Linear(6, 6, bias=False),
        )
        self.function = function

    def forward(self, x):
        return self.function(self, self.norm(x))


def found(function, **options):
    return find_norm_readers(Net(function, **options), torch.randn(2, 4, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x) + m.b(x),
        lambda m, x: m.a(x[:, 0]) + m.b(x.roll(1, 1)).sum(1),
        lambda m, x: m.a(F.pad(x, (0, 0, 0, 0)).view(4, 2, 6)) + m.b(x.permute(1, 0, 2).contiguous()),
        lambda m, x: m.a(F.dropout(x, 0.5, training=False)) + m.b(nn.Identity()(x)) + x.new_zeros(6) * x.shape[0],
        lambda m, x: F.linear(x, weight=m.a.weight, bias=m.a.bias) + m.b(x),
    ],
)
def test_readers_are_found_through_what_moves_tokens(function):
    assert found(function) == [("norm", ["a", "b"])]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.a(x) + x,
        lambda m, x: m.a(x) + m.b(x.relu()),
        lambda m, x: (m.a(x), x),
        lambda m, x: {"out": m.a(x), "more": [x[:, :1]]},
        lambda m, x: m.a(x) + m.a(m.b(x)),  # a layer that runs twice
        lambda m, x: m.a(m.norm(x)),  # so does the norm
        lambda m, x: m.a(F.pad(x, (0, 0, 0, 2))),  # zeros that the norm does not put out
        lambda m, x: F.linear(x, m.a.weight * 2),
        lambda m, x: F.linear(x, m.a.weight, m.a.bias * 2),
        lambda m, x: F.linear(x, m.a.weight),
        lambda m, x: m.a(x.transpose(1, 2).reshape(2, 2, 12)[..., :6]),  # channels are tokens now
        lambda m, x: m.a(torch.ones(6, 6)).sum() + F.linear(torch.ones(1, 6), x[0]),
        lambda m, x: x,
    ],
)
def test_other_readers_spoil_it(function):
    assert found(function) == []


def test_a_norm_without_weights_is_not_asked_for():
    assert found(lambda m, x: m.a(x), affine=False) == []


def test_windows_and_class_tokens():
    swin = dict(find_norm_readers(*build("swin")))
    assert swin["layers.0.blocks.1.norm1"] == ["layers.0.blocks.1.attn.qkv"]  # shifted
    assert swin["layers.1.downsample.norm"] == ["layers.1.downsample.reduction"]
    deit = dict(find_norm_readers(*build("deit")))
    assert deit["norm"] == ["head", "head_dist"]
    hugging_face = dict(find_norm_readers(*build("hf_vit_sdpa")))
    assert len(hugging_face["vit.layers.0.layernorm_before"]) == 3


def test_the_model_is_as_it_was():
    model = Net(lambda m, x: m.a(x)).train()
    find_norm_readers(model, torch.randn(2, 4, 6))
    assert model.training
