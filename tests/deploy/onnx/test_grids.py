"""The grid of a node in numpy against planish.functional, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from planish.deploy.onnx.grids import read_grid
from planish.deploy.onnx.tidy import quantizers
from planish.functional import Grid, fake_quantize, quantize
from tests.deploy.onnx_graphs import Build, plain

GRIDS = {
    "tensor": (np.float32(0.21), np.float32(5), 0, 15, 0.0), "half": (np.float32(0.6), np.float32(0), -2, 1, 0.5),
    "signed": (np.float32(0.05), np.float32(0), -128, 127, 0.0),
    "channel": (np.float32([[0.1], [0.3], [0.7]]), np.float32([[0], [3], [7]]), 0, 7, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_codes_values_and_the_float_form_are_those_of_functional(name):
    scale, zero, low, high, offset = GRIDS[name]
    x = np.random.default_rng(0).standard_normal((3, 400)).astype(np.float32)
    x[:, :60] = np.float32(scale) * np.arange(-30, 30, dtype=np.float32) / 2  # ties
    build = Build([3, 400])
    model = build.model(build.quantize("images", scale, zero, low, high, offset=offset, granularity="channel"))
    grid = read_grid(quantizers(model.graph)[0])
    theirs = Grid(torch.tensor(scale), torch.tensor(zero), low, high, offset)
    np.testing.assert_array_equal(grid.codes(x), quantize(torch.from_numpy(x), theirs))
    np.testing.assert_array_equal(grid.values(x), fake_quantize(torch.from_numpy(x), theirs))
    np.testing.assert_array_equal(plain(model)(x), fake_quantize(torch.from_numpy(x), theirs))


def test_limits_and_keys():
    build = Build([3])
    for zero in (5, 5, 4):
        build.quantize("images", 0.2, zero)
    first, second, third = map(read_grid, quantizers(build.model(build.node("Neg", "images")).graph))
    assert first.key() == second.key() != third.key()
    limited = first.limited(0.0, 1.0)
    assert (limited.low, limited.high) == (5, 10)
    assert limited.limited(-9.0, None) == limited
    assert limited.key() != first.key()
    assert first.per_tensor
    assert not first.signed
