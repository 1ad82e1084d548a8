"""Networks of transformers and torchvision through everything: flatten, ledger, quantize, evaluate, save, export.

Outputs are tensors, mappings (transformers), named tuples and dataclasses; nothing on the way may care.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig

import planish
from planish.models import Preprocessing
from planish.network.batches import logits_of
from tests.models.tiny_transformers import CONFIGS, network

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5
LOOKS = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
LOADER = DataLoader(TensorDataset(IMAGES, LABELS), 4)
SMALL_VIT = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 5}
TORCHVISION = {
    "tv-resnet18": lambda: tv.get_model("resnet18", num_classes=5),
    "tv-mobilenet_v3": lambda: tv.MobileNetV3([
        tv.mobilenetv3.InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        tv.mobilenetv3.InvertedResidualConfig(16, 3, 32, 16, False, "HS", 1, 1, 1.0),
    ], last_channel=32, num_classes=5),
    "tv-efficientnet": lambda: tv.EfficientNet([
        tv.efficientnet.MBConvConfig(1, 3, 2, 16, 16, 1), tv.efficientnet.MBConvConfig(2, 3, 1, 16, 16, 1),
    ], dropout=0.0, num_classes=5),
    "tv-vit": lambda: tv.VisionTransformer(32, 8, **SMALL_VIT),
    "tv-swin": lambda: tv.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5),
    "tv-swin_v2": lambda: tv.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=5, block=tv.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=tv.swin_transformer.PatchMergingV2,
    ),
    "tv-convnext": lambda: tv.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5),
    "tv-maxvit": lambda: tv.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8, 16], block_layers=[1, 1],
        head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
    ),
}  # fmt: skip


def one_of(name):
    if name in CONFIGS:
        return network(name)
    torch.manual_seed(0)
    model = TORCHVISION[name]().eval()
    with torch.no_grad():  # some heads and biases begin with zeros
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name != "deit-teacher"), *TORCHVISION])
def test_flatten_quantize_evaluate_save_export(name, tmp_path):
    model = one_of(name)
    flat = planish.flatten(model, LOADER, scheme="w4a4", epochs=1)
    assert type(flat) is type(model)
    assert flat.state_dict().keys() == model.state_dict().keys()
    quantized = planish.quantize(flat, [IMAGES], "w4a4")
    ledger = str(planish.ledger(quantized))
    assert "w4a4" in ledger
    assert not quantized.planish_assignment.allowed
    worth = planish.evaluate(quantized, LOADER, reference=flat)
    assert worth["images"] == 8
    assert 0 <= worth["flip_rate"] <= 1
    exported = planish.export(quantized, tmp_path / "m.onnx", preprocessing=LOOKS)
    assert exported.agreement.top1 >= 7 / 8
    assert not exported.agreement.beyond_ties
    if name in CONFIGS:  # a convolution on integers may round to the next code where a sum lies near a border
        assert exported.agreement.largest < 1e-4
    if name in CONFIGS:
        planish.save(quantized, tmp_path / "m", preprocessing=LOOKS)
    elif (architecture := name.removeprefix("tv-")) in tv.list_models(module=tv):
        recipe = {"source": "torchvision", "architecture": architecture, "arguments": {"num_classes": 5}}
        planish.save(quantized, tmp_path / "m", recipe=recipe, preprocessing=LOOKS)
    else:  # made by hand
        return
    again = planish.load(tmp_path / "m")
    assert torch.equal(logits_of(again(IMAGES)), logits_of(quantized(IMAGES)))


@pytest.mark.parametrize("name", [*CONFIGS, "tv-vit", "tv-swin", "tv-mobilenet_v3"])
def test_a_preset_that_reconstructs(name):
    model = one_of(name)
    quantized = planish.quantize(model, [IMAGES], "w4a4", method="fast")
    plain = planish.quantize(model, [IMAGES], "w4a4", method="rtn")
    wanted = logits_of(model(IMAGES))
    errors = [(logits_of(m(IMAGES)) - wanted).square().mean() for m in (quantized, plain)]
    assert errors[0] < errors[1]


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """Its output is made by a function of logits and features."""

    def __init__(self, shape):
        super().__init__()
        self.conv, self.head, self.shape = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 5), shape

    def forward(self, images):
        features = self.conv(images).relu().mean((2, 3))
        return self.shape(self.head(features), features)


SHAPES = {
    "tensor": lambda logits, _: logits, "dataclass": Answer, "named tuple": Pair,
    "tuple": lambda *parts: parts, "list": lambda *parts: list(parts),
    "dict": lambda logits, features: {"features": features, "logits": logits},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_every_shape_are_worth_the_same(shape, tmp_path):
    torch.manual_seed(0)
    model = Net(SHAPES[shape]).eval()
    plain = Net(SHAPES["tensor"]).eval()
    plain.load_state_dict(model.state_dict())
    results = []
    for one in (model, plain):
        quantized = planish.quantize(one, [IMAGES], "w4a4", method="fast")
        done = planish.export(quantized, tmp_path / "m.onnx", preprocessing=LOOKS)
        flat = planish.flatten(one, LOADER, scheme="w4a4", epochs=1)
        worth = planish.evaluate(quantized, LOADER, reference=one)
        del worth["seconds"]
        results.append((worth, done.agreement.top1, done.bytes, [p.sum().item() for p in flat.parameters()]))
    assert results[0][:2] == results[1][:2]
    assert results[0][3] == results[1][3]
    assert results[0][1] >= 7 / 8
