"""The integers of a weight: bytes that hold them, and the factor that they may be multiplied with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.deploy.onnx.grids import NodeGrid
from planish.deploy.onnx.weights import WeightCodes


def node_grid(bits=4, scale=0.1, zero=0.0, offset=0.0, granularity="tensor", axis=0, low=None, high=None):
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if low is None else (low, high)
    scale, zero = np.asarray(scale, np.float32), np.asarray(zero, np.float32)
    return NodeGrid(scale, zero, qmin, qmax, offset, granularity, axis, 0, "layer.weight", qmin, qmax)


@settings(max_examples=200, deadline=None)
@given(codes=st.lists(st.integers(-128, 127), min_size=1, max_size=8), span=st.integers(1, 255))
def test_factor_leaves_codes_in_a_byte_and_pairs_in_16_bits(codes, span):
    values = np.array(codes, np.int8)
    weight = WeightCodes("w", values, 8, np.ones(1, np.float32), 0, True)
    factor = weight.factor(span)
    assert factor in (1, 2, 4, 8, 16, 32, 64, 128)
    if factor > 1:
        tuned = weight.with_scale(weight.scale, factor).codes
        assert tuned.min() >= -128
        assert tuned.max() <= 127
        assert 2 * np.abs(tuned).max() * span <= 32767
    twice = weight.with_scale(weight.scale, 2 * factor).codes
    if values.any():  # it is the largest one
        assert twice.max() > 127 or twice.min() < -128 or 2 * np.abs(twice).max() * span > 32767


@pytest.mark.parametrize(("bits", "offset"), [(2, 0.5), (4, 0.5), (7, 0.5), (2, 0), (3, 0), (8, 0)])
@pytest.mark.parametrize("permutation", [None, [1, 0]])
def test_codes_times_scale_are_the_weight(bits, offset, permutation):
    values = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    scale = np.linspace(0.1, 0.4, 5, dtype=np.float32)[:, None] * np.float32(2.0 ** (3 - bits))
    grid = node_grid(bits, scale, offset=offset, granularity="channel")
    weight = WeightCodes.of(values, grid, permutation)
    shape = (-1, 1) if permutation is None else (1, -1)
    expected = grid.values(values) if permutation is None else grid.values(values).T
    np.testing.assert_allclose(weight.codes * weight.scale.reshape(shape), expected, rtol=1e-6)
    assert (weight.bits, weight.axis, weight.symmetric) == (bits, 0 if permutation is None else 1, True)
    assert np.abs(weight.codes).max() <= 128


def test_groups_have_no_axis_and_zero_points_are_not_symmetric():
    values = np.zeros((4, 6), np.float32)
    assert WeightCodes.of(values, node_grid(scale=np.full((4, 6), 0.1), granularity="group")).axis is None
    assert not WeightCodes.of(values, node_grid(zero=3.0, low=0, high=15)).symmetric


def test_reach_is_that_of_every_input():
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (3, 2, 2, 1)).astype(np.int8)
    weight = WeightCodes("w", codes, 4, np.ones(1, np.float32), 0, True)
    for zero, low, high in ((3.0, 0, 7), (0.0, 2, 5), (0.0, -4, 3)):
        reach = weight.reach(node_grid(zero=zero, low=low, high=high))
        levels = {low - zero, high - zero, 0.0}  # the padding is zero
        inputs = np.stack(np.meshgrid(*[sorted(levels)] * 4), -1).reshape(-1, 4)
        sums = inputs @ codes.reshape(3, 4).T
        np.testing.assert_array_equal(reach, np.stack([sums.min(0), sums.max(0)], 1))


def test_types_that_hold_them():
    assert ir.DataType.INT2.itemsize == 0.25  # what the sizes in a report rest on
    assert ir.DataType.INT4.itemsize == 0.5
