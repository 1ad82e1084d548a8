"""Optimizers and their defaults."""

import pytest
import torch
from torch import nn

from planish.training import TrainingSettings
from planish.training.engine import make_optimizer

CONV, BATCHNORM, LAYERNORM = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("layers", "kind", "lr"),
    [
        ([CONV, BATCHNORM], torch.optim.SGD, 0.02),
        ([CONV, LAYERNORM], torch.optim.AdamW, 5e-4),
        ([CONV], torch.optim.AdamW, 5e-4),
        ([CONV, BATCHNORM, LAYERNORM], torch.optim.AdamW, 5e-4),  # a transformer behind a convolutional stem
    ],
)
def test_the_optimizer_follows_the_norms(layers, kind, lr):
    optimizer, peak = make_optimizer(nn.Sequential(*layers), TrainingSettings())
    assert type(optimizer) is kind
    assert peak == lr


def test_a_named_optimizer_and_rate_win():
    optimizer, peak = make_optimizer(nn.Sequential(CONV, LAYERNORM), TrainingSettings(optimizer="sgd", lr=0.1))
    assert type(optimizer) is torch.optim.SGD
    assert peak == 0.1
