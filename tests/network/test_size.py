"""The size that weights really have."""

import pytest
import torch
from torch import nn

from planish.network import weights_megabytes
from planish.ptq import quantize


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.again, self.last = (nn.Linear(n, m) for n, m in ((4, 8), (8, 8), (8, 8), (8, 3)))
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.last(self.again(self.inner(self.first(x)).relu()).relu())


def test_the_size_counts_a_tied_weight_once_and_every_scale():
    model = Tied()
    parameters = 4 * 8 + 8 * 8 + 8 * 3 + 8 + 8 + 8 + 3
    assert weights_megabytes(model) == pytest.approx(4e-6 * parameters)
    small = quantize(model, [torch.randn(4, 4)], "w4")
    weights = 4 * 8 * 1 + 8 * 8 * 0.5 + 8 * 3 * 1 + 4 * (8 + 8 + 8 + 3)  # first and last layer at 8 bits
    least, most = (
        weights + 4 * (8 + 8 + 3),
        weights + 4 * (8 + 8 + 3) + 4 * 8 + 16,
    )  # scales; the tied weight's twice at most
    assert least <= 1e6 * weights_megabytes(small) <= most
