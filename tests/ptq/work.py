"""A calibration to call passes on, as ``planish.quantize`` makes it."""

import copy

import torch
from torch import nn

from planish.network import assign, watch
from planish.network.batches import first_image
from planish.ptq.passes import Calibration, run_logits
from tests.training import tiny


def work(model, batches, scheme="w4a4", passes=()):
    """The calibration, after the passes."""
    model.eval()
    twin = copy.deepcopy(model).requires_grad_(False)
    plan = assign(watch(twin, first_image(batches[0])), scheme)
    calibration = Calibration(twin, list(batches), plan, run_logits(twin, batches), given=model)
    for step in passes:
        step(calibration)
    return calibration


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def notes(calibration):
    return [record["text"] for record in calibration.log if record["event"] == "note"]


def randomize_norms(model, seed=0):
    """BatchNorm statistics and affine parameters as after training."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(0, 0.3)
    return model.eval()


def separable():
    """A network with a depthwise convolution and BatchNorm, for (N, 1, 8, 8) images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Hardswish(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def images(n=12, size=8, seed=0):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


NETWORKS = {"conv": (tiny.conv, 8), "separable": (separable, 8), "vit": (tiny.vit, 16)}


def network(name):
    """A small network with statistics as after training, and two batches of images for it."""
    build, size = NETWORKS[name]
    return randomize_norms(build()), [images(9, size), images(4, size, seed=1)]
