"""Finding MLPs by what flows through them."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from planish.network.batches import first_image
from planish.network.mlps import MLP, find_mlps, put_relu
from tests.network.zoo import build

PATHS = {
    "vit_gray_28": [(f"blocks.{i}.mlp", ("fc1", "act", "fc2")) for i in (0, 1)],
    "swin": [
        (f"layers.{i}.blocks.{j}.mlp", ("fc1", "act", "fc2")) for i in (0, 1) for j in (0, 1)
    ],
    "hf_vit_sdpa": None,
    "test_resnet": [],
    "twice": [],
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_the_mlps_of_many_networks(name):
    model, example = build(name)
    found = find_mlps(model, first_image(example))
    if PATHS[name] is None:
        assert len(found) == 2
        return
    assert found == [MLP(*(f"{path}.{part}" for part in parts)) for path, parts in PATHS[name]]


class Odd(nn.Module):
    """Only `good` is an MLP: the others have no GELU between, no bias, something in between, run twice, or have two
    readers or one that takes something else for the channels."""

    def __init__(self):
        super().__init__()
        linear = lambda bias=True: nn.Linear(4, 4, bias=bias)  # noqa: E731
        self.good = nn.Sequential(linear(), nn.Dropout(0.5), nn.GELU(approximate="tanh"), nn.Dropout(0.5), linear())
        self.silu = nn.Sequential(linear(), nn.SiLU(), linear())
        self.plain = nn.Sequential(linear(False), nn.GELU(), linear())
        self.between = nn.Sequential(linear(), nn.GELU(), nn.LayerNorm(4), linear())
        self.again = nn.Sequential(linear(), nn.GELU(), linear())
        self.one, self.two = linear(), linear()
        self.both, self.left, self.right = nn.Sequential(linear(), nn.GELU()), linear(), linear()
        self.turned, self.after = nn.Sequential(linear(), nn.GELU()), linear()

    def forward(self, x):
        x = self.between(self.plain(self.silu(self.good(x))))
        x = self.two(F.gelu(self.one(self.again(self.again(x)))))
        x = self.both(x)
        x = self.left(x) + self.right(x)
        return self.after(self.turned(x).mT)


def test_what_is_no_mlp():
    torch.manual_seed(0)
    assert find_mlps(Odd().eval(), torch.randn(1, 4, 4)) == [MLP("good.0", "good.2", "good.4")]


def test_a_relu_is_put_there():
    model = timm.create_model("test_vit", img_size=32).eval()
    put_relu(model, paths=["blocks.0.mlp.act"])
    assert isinstance(model.blocks[0].mlp.act, nn.ReLU)
    assert isinstance(model.blocks[1].mlp.act, nn.GELU)


def test_the_layers_of_pytorch_with_a_mask():
    """In eval mode they would make a nested tensor of it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    mask = torch.arange(5).ge(torch.tensor([[5], [4]]))
    found = find_mlps(model, {"src": torch.randn(2, 5, 8), "src_key_padding_mask": mask})
    assert found == [MLP(*(f"layers.0.{name}" for name in ("linear1", "activation", "linear2")))]
    assert torch.backends.mha.get_fastpath_enabled()


@torch.no_grad()
def test_a_relu_in_the_layers_of_pytorch_is_called():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True).eval()
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="relu", batch_first=True).eval()
    plain.load_state_dict(model.state_dict())
    put_relu(model, paths=["activation"])
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x), plain(x))
