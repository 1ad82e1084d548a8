"""Factors and parts behind a module: the layer behind takes them back, under every name that a module has."""

import copy

import pytest
import torch
from torch import nn

from planish.network.hidden import Parts, Smoothed, put_factors, put_parts
from planish.network.rebuilding import rebuild, rebuilt


def test_factors_are_taken_back():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.GELU(), nn.Linear(6, 3)), torch.randn(4, 6)
    expected = model(x)
    assert put_factors(model, [("0", 6)]) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # all 1
    factors = torch.rand(6) + 0.5
    with torch.no_grad():
        model[0].factors.copy_(1 / factors)
        model[1].weight.mul_(factors)
    torch.testing.assert_close(model(x), expected)


def test_parts_add_up_to_what_they_were():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.GELU(), nn.Linear(6, 3)), torch.randn(4, 6)
    expected = model(x)
    assert put_parts(model, [("0", "1", [(1, 4), (5, 3)])]) == ["0"]
    assert model[1].weight.shape == (3, 11)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(Parts(6, [(1, 4), (5, 3)])(x)[:, 1:5].sum(1), x[:, 1])


@torch.no_grad()
def test_parts_are_exact_in_float64():
    """A third is no number of float32, in which the factors are stored; the columns make up for it."""
    model, x = nn.Sequential(nn.Identity(), nn.Linear(2, 1)).double(), torch.tensor([[1e6, 1.0]]).double()
    model[1].weight.fill_(1.0)
    model[1].bias.fill_(-1e6)
    put_parts(model, [("0", "1", [(0, 3)])])
    torch.testing.assert_close(model(x), torch.ones(1, 1).double(), rtol=1e-9, atol=1e-9)


def test_what_stays_inside_keeps_its_mode():
    model = nn.Sequential(nn.Sequential(nn.Dropout(0.5), nn.GELU()), nn.Linear(6, 3)).train()
    model[0][0].eval()
    put_factors(model, [("0", 6)])
    assert model[0].training
    assert not model[0].inner[0].training
    assert put_parts(model.eval(), [("0", "1", [(1, 3)])])
    assert not any(module.training for module in model.modules())


class Twice(nn.Module):
    """A GELU and a layer that have two names each."""

    def __init__(self):
        super().__init__()
        self.act, self.out = nn.GELU(), nn.Linear(6, 3)
        self.seq = nn.Sequential(nn.Linear(4, 6), self.act, self.out)

    def forward(self, x):
        return self.seq(x)


def test_a_module_with_two_names_is_exchanged_under_both():
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(5, 4)
    again, expected = copy.deepcopy(model), model(x)
    put_factors(model, [("act", 6)])
    put_parts(model, [("act", "out", [(1, 3)])])
    assert model.act is model.seq[1]
    assert model.out is model.seq[2]
    torch.testing.assert_close(model(x), expected)
    rebuild(again, rebuilt(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_the_layers_of_pytorch_call_what_is_put_there(nested):
    """In eval mode their kernel for inference reads the weights and takes the activation for the GELU it was."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(3, 5, 8)
    given = {"src_key_padding_mask": torch.arange(5).ge(torch.tensor([[5], [4], [3]]))} if nested else {}
    seen = ~given.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    expected = model(x, **given)[seen]
    put_parts(model, [("layers.0.activation", "layers.0.linear2", [(1, 3)])])
    torch.testing.assert_close(model(x, **given)[seen], expected)
    put_factors(model, [("layers.0.activation.0", 16)])
    smoothed = model.layers[0].activation[0]
    assert isinstance(smoothed, Smoothed)
    smoothed.factors.fill_(2)
    model.layers[0].linear2.weight.div_(2)
    torch.testing.assert_close(model(x, **given)[seen], expected)
