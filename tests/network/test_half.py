"""Constants rounded to half precision: which, how far, and what stays."""

import copy

import torch
from torch import nn

from planish.functional import quantize as codes_of
from planish.network import taps_of
from planish.network.half import LEAST, round_constants, rounded
from planish.ptq import quantize
from tests.deploy.tiny import RECIPES, network

torch.set_num_threads(1)


def test_numbers_out_of_reach_stay_in_float():
    assert rounded(torch.tensor([1.0, 1e6])) is None
    assert rounded(torch.tensor([1.0, 1e-6])) is None  # as a scale it would lose 5 % of itself
    torch.testing.assert_close(rounded(torch.tensor([-1.0, 1e-6])), torch.tensor([-1.0, 1e-6]), rtol=0, atol=1e-7)
    x = torch.rand(1000) + 0.1
    assert float(((rounded(x) - x) / x).abs().max()) <= 2.0**-11
    layer = nn.Linear(4, LEAST)
    layer.bias.data.fill_(1e6)
    assert round_constants(layer, None) == 1
    assert torch.equal(layer.weight, layer.weight.half().float())
    assert layer.bias[0].item() == 1e6


class Tied(nn.Module):
    """A classifier whose weight is also a table that is read as it is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mid, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.table = nn.Embedding(20, 16)
        self.table.weight = self.head.weight

    def forward(self, x):
        return self.head(self.mid(self.stem(x).relu()).relu() + self.table.weight[0])


def test_a_weight_that_is_read_elsewhere_too_stays():
    images = torch.randn(32, 8)
    model = quantize(Tied().eval(), [images], "w4a4", "rtn")
    before = model.head.weight.clone()
    assert round_constants(model, model.planish_assignment) > 0
    assert torch.equal(model.head.weight, before)


def test_codes_and_norms_stay_and_the_rest_is_of_half_precision():
    for name in RECIPES:
        model, images = network(name)
        model = quantize(model, [images], "w4a4", "rtn")
        twin = copy.deepcopy(model)
        assert round_constants(twin, twin.planish_assignment) > 0
        assert round_constants(twin, twin.planish_assignment) == 0
        taps = dict(taps_of(twin))
        weights = set()
        for site, _ in twin.planish_assignment.quantized():
            if site.parameter:
                pair = [m.get_submodule(site.owner)._parameters[site.slot] for m in (model, twin)]
                grids = [dict(taps_of(m))[site.name].grid for m in (model, twin)]
                assert torch.equal(*(codes_of(weight, grid) for weight, grid in zip(pair, grids, strict=True)))
                values = pair[1] / taps[site.name].scale  # on its grid
                torch.testing.assert_close(values, (values * 2).round() / 2, atol=1e-4, rtol=0)
                weights.add(id(pair[1]))
        for key, module in twin.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None or not tensor.is_floating_point() or id(tensor) in weights or tensor.numel() < LEAST:
                    continue
                halved = torch.equal(tensor, tensor.half().float()) or rounded(tensor) is None  # a token of 1e-6
                assert halved or isinstance(module, nn.modules.batchnorm._BatchNorm), key
        for norm, same in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), same.buffers(), strict=True))
