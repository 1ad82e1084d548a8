"""Pairs of layers with only homogeneous functions in between: which are found, and which are not."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import nn

from planish.network import fold_batchnorm
from planish.network.chains import Chain, find_chains
from tests.network.zoo import build, image

X = image(9, channels=4)


def line(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def conv(*args, **options):
    return nn.Conv2d(*args, 3, padding=1, **options)


FOUND = {
    "nothing between": [conv(4, 6), conv(6, 5)],
    "relu": [conv(4, 6), nn.ReLU(), conv(6, 5)],
    "relu in place": [conv(4, 6, bias=False), nn.ReLU(inplace=True), conv(6, 5)],
    "leaky": [conv(4, 6), nn.LeakyReLU(0.1, inplace=True), conv(6, 5)],
    "prelu": [conv(4, 6), nn.PReLU(6), conv(6, 5)],
    "dropout, pooling": [conv(4, 6), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2), nn.AvgPool2d(2), conv(6, 5)],
    "reflected": [conv(4, 6), nn.ReLU(), conv(6, 5, padding_mode="reflect")],
    "depthwise": [conv(4, 6), nn.ReLU(), conv(6, 12, groups=6)],
    "transposed": [nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2)],
    "pooled": [conv(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)],
}


@pytest.mark.parametrize("layers", FOUND.values(), ids=FOUND)
def test_found(layers):
    model = line(*layers)
    assert find_chains(model, X) == [Chain("0", str(len(layers) - 1))]
    with torch.no_grad():
        assert torch.equal(model(X), model(X))  # it runs as before


def test_channels_repeat_where_a_map_is_flattened():
    model = line(conv(4, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
    assert find_chains(model, X) == [Chain("0", "4", repeats=4)]


@pytest.mark.parametrize("shape", [(3, 4), (3, 7, 4)])
def test_linear_layers_on_vectors_and_on_tokens(shape):
    model = line(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    assert find_chains(model, torch.randn(shape)) == [Chain("0", "2")]


class ViaPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(3, 5)

    def forward(self, x):
        return self.second(F.max_pool1d(self.first(x), 2))


def test_pooling_over_features_is_not_pooling_over_positions():
    assert find_chains(ViaPool(), torch.randn(2, 7, 4)) == []


NOT = {
    "gelu": [conv(4, 6), nn.GELU(), conv(6, 5)],
    "sigmoid": [conv(4, 6), nn.Sigmoid(), conv(6, 5)],
    "BatchNorm": [conv(4, 6), nn.BatchNorm2d(6, affine=True), nn.ReLU(), conv(6, 5)],
    "padded with ones": [conv(4, 6), nn.ConstantPad2d(1, 1.0), conv(6, 5)],
    "standardized": [StdConv2d(4, 6, 3), nn.ReLU(), conv(6, 5)],
}


@pytest.mark.parametrize("layers", NOT.values(), ids=NOT)
def test_not_found(layers):
    model = line(*layers)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.3)
    assert find_chains(model, X) == []


def test_a_clipping_activation_is_told():
    model = line(conv(4, 6), nn.ReLU6(inplace=True), conv(6, 6, groups=6), nn.ReLU(), conv(6, 5))
    assert find_chains(model, X) == [Chain("0", "2", clipped=True), Chain("2", "4")]


class Uses(nn.Module):
    """Two layers, and something else that is done on the way."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = conv(4, 4), conv(4, 4), use
        if use == "tied":
            self.b.weight = self.a.weight

    def forward(self, x):
        y = self.a(x)
        if self.use == "late":  # the map is read again after it was rectified in place
            z = self.b(y.relu_())
            return z + y
        if self.use == "before":
            return self.b(y.relu()) + y
        if self.use == "returned":
            return self.b(y), y
        if self.use == "twice":
            return self.b(self.a(y).relu())
        if self.use == "twice as operand":
            return self.b(y + y)
        if self.use == "weight":
            return self.b(y) * self.b.weight.mean()
        return self.b(y.relu())


@pytest.mark.parametrize("use", ["late", "before", "returned", "twice", "twice as operand", "weight", "tied"])
def test_what_is_used_elsewhere_is_left_alone(use):
    assert find_chains(Uses(use), X) == []
    assert find_chains(Uses("once"), X) == [Chain("a", "b")]


def test_networks():
    model, x = build("test_resnet")
    assert find_chains(model, x) == []  # BatchNorm shifts
    fold_batchnorm(model, x)
    inside = [c for c in find_chains(model, x) if c.first.startswith("layer")]
    blocks = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith("conv2")}
    assert {c.first.rpartition(".")[0] for c in inside} == blocks
    assert find_chains(*build("vit_gray_28")) == []
    torch.manual_seed(0)
    mobile = timm.create_model("mobilenetv2_035", num_classes=3).eval()
    fold_batchnorm(mobile, image(32))
    found = find_chains(mobile, image(32))
    assert Chain("blocks.1.0.conv_pw", "blocks.1.0.conv_dw", clipped=True) in found
    assert Chain("blocks.1.0.conv_dw", "blocks.1.0.conv_pwl", clipped=True) in found
