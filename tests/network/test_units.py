"""The units of reconstruction, found in models of many kinds by the graph alone."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from planish.network import watch
from planish.network.units import find_units, join_units
from planish.ptq import quantize
from tests.training import tiny

torch.set_num_threads(1)
SIZE = 64


def units(model, size=SIZE, channels=3, **options):
    model = model.eval()
    example = torch.randn(1, channels, size, size)
    products = watch(model, example).products
    return find_units(model, example, products, **options), products


def paths(model, **options):
    return [unit.path for unit in units(model, **options)[0]]


MODELS = {
    "resnet": lambda: timm.create_model("resnet18"),
    "bottlenecks": lambda: torchvision.models.resnet50(),
    "mobilenet": lambda: timm.create_model("mobilenetv2_050"),
    "squeeze and excite": lambda: timm.create_model("mobilenetv3_small_050"),
    "convnext": lambda: timm.create_model("convnext_atto"),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2, depths=(1, 1, 2, 1)
    ),
    "densenet": lambda: torchvision.models.densenet121(),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=3),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_is_in_one_unit(name):
    found, products = units(MODELS[name]())
    order = {product.name: i for i, product in enumerate(products)}
    weighted = [product.name for product in products if product.weight is not None]
    held = [name for unit in found for name in unit.products]
    assert sorted(name for name in held if name in weighted) == sorted(weighted)
    assert len(held) == len(set(held))
    first = [order[unit.products[0]] for unit in found]
    assert first == sorted(first)
    assert all(unit.link for unit in found)


def test_residual_blocks_are_units():
    resnet = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert paths(MODELS["resnet"]()) == ["conv1", *resnet, "fc"]
    assert paths(MODELS["vit"]()) == ["patch_embed", *(f"blocks.{i}" for i in range(3)), "head"]
    assert paths(MODELS["mobilenet"]())[:4] == ["conv_stem", "blocks.0.0", "blocks.1.0", "blocks.1.1"]
    assert paths(MODELS["densenet"]())[:3] == ["features.conv0", "features.denseblock1", "features.transition1"]


def test_a_plain_sequence_is_divided_into_layers():
    assert paths(tiny.conv(), size=8, channels=1) == ["0", "4", "9"]


def test_layers_of_a_block_without_a_shortcut_stay_together_up_to_a_limit():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert paths(model) == ["0", "3"]
    assert paths(model, layers=2) == ["0.0", "0.1", "0.2", "3"]


class Odd(nn.Module):
    """Two branches, a layer that is used twice, and a weight that no module of its own holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        x = self.twice(self.twice(x.mean((2, 3)) @ torch.ones(3, 4)))
        return nn.functional.linear(self.a(x) * self.b(x), self.last)


def test_what_cannot_be_cut_out_is_no_link():
    found, _ = units(Odd())
    assert {unit.path: unit.link for unit in found} == {"twice": False, "a": False, "b": False}


def test_the_parameters_are_left_as_they_were():
    model = tiny.vit()
    model.head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    units(model, size=16, channels=1)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_units_are_joined_where_their_sizes_differ_most():
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in [(4, 4), (4, 40), (40, 40), (40, 2), (2, 2)])).eval()
    example = torch.randn(1, 4)
    products = watch(model, example).products
    found = find_units(model, example, products)
    names = [[unit.name for unit in join_units(found, products, count)] for count in range(4)]
    assert names[0] == ["0", "1", "2", "3", "4"]  # 16, 160, 1600, 80 and 4 weights
    assert names[1] in (["0", "1", "2 + 3", "4"], ["0", "1", "2", "3 + 4"])
    assert names[2] == ["0", "1", "2 + 3 + 4"]
    joined = join_units(found, products, 2)[-1]
    assert (joined.first, joined.path, joined.shape) == ("2", "4", (1, 2))
    assert joined.products == tuple(name for unit in found[2:] for name in unit.products)


class _Tuples(nn.Module):
    """Blocks that return a tuple: the tensor with its side, or alone."""

    class Block(nn.Module):
        def __init__(self, rest):
            super().__init__()
            self.first, self.second, self.rest = nn.Linear(8, 8), nn.Linear(8, 8), rest

        def forward(self, x):
            return (x + self.second(self.first(x).relu()), *self.rest)

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = self.Block(((4, 4), None)), self.Block(()), nn.Linear(8, 3)

    def forward(self, x):
        x, (height, width), _ = self.one(x.flatten(1)[:, :8])
        (x,) = self.two(x * (height == width))
        return self.head(x)


def test_what_a_block_returns_beside_its_tensor_is_known():
    found, _ = units(_Tuples())
    assert [unit.path for unit in found] == ["one", "two", "head"]
    assert [unit.rest for unit in found] == [((4, 4), None), (), None]
    x = torch.zeros(1)
    assert [unit.returned(x) for unit in found] == [(x, (4, 4), None), (x,), x]
    assert all(unit.link for unit in found)


@pytest.mark.parametrize("method", ["fast", "qdrop"])
def test_networks_of_such_blocks_are_quantized(method):
    torch.manual_seed(0)
    model, images = _Tuples().eval(), torch.randn(8, 3, 4, 4)
    made = quantize(model, [images[:5], images[5:]], "w4a4", method=method)
    plain = quantize(model, [images[:5], images[5:]], "w4a4")
    errors = [(m(images) - model(images)).square().mean() for m in (made, plain)]
    assert errors[0] < errors[1]
