"""Tiny models, random data and shorthands that the tests of training and flattening share."""

from __future__ import annotations

import timm
import torch
from torch import nn
from torch.utils.data import TensorDataset

from planish.data import make_loader
from planish.network import assign, watch
from planish.training import TaskLoss, TrainingSettings, train

torch.set_num_threads(1)

STEPS = 6  # batches of an epoch of `loader()`


def conv(seed=0, dropout=0.0):
    """Two convolutions with BatchNorm and a head, for (N, 1, 8, 8) images and 4 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def vit(seed=0):
    """A ViT of two blocks for (N, 1, 16, 16) images and 4 classes."""
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, in_chans=1, num_classes=4
    )


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))


def data(n=24, size=8, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, size, size, generator=generator)
    return TensorDataset(images, torch.randint(0, classes, (n,), generator=generator))


def loader(n=24, batch=4, size=8, seed=0, shuffle=True):
    return make_loader(data(n, size, seed), batch, shuffle=shuffle, seed=seed)


def settings(**changes):
    base = {"epochs": 2, "optimizer": "sgd", "lr": 0.05, "freeze_batchnorm": False}
    return TrainingSettings(**{**base, **changes})


def plan(model, scheme="w4a4", size=8):
    return assign(watch(model, torch.randn(1, 1, size, size)), scheme)


def fit(model, ingredients=(), batches=None, *, task=True, run_settings=None, **options):
    """Train in place; the task loss is added."""
    terms = [*ingredients, TaskLoss()] if task else list(ingredients)
    return train(model, loader() if batches is None else batches, terms, run_settings or settings(), **options)


def same(a, b):
    """Whether two models hold the same state, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class InPlace(nn.Module):
    """Activations that follow a place where the network can be cut, and are not idempotent."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act, self.head = nn.Hardswish(inplace=inplace), nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = x + self.second(self.act(self.first(x)))
        return self.head(self.act(x).mean((2, 3)))
