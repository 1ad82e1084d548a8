"""The integer bias and the multiplier against every sum in reach, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.deploy.onnx.matching import LARGEST, boundaries, match


def code_of(total, scale, bias, step, zero_point, low, high):
    """clamp(round((a s + b) / t) + z) with fractions; Python rounds them half to even."""
    value = (total * Fraction(float(scale)) + Fraction(float(bias))) / Fraction(float(step))
    return min(max(round(value) + zero_point, low), high)


def kernel_code(total, factor, bias, multiplier, zero_point, low, high):
    """What an integer kernel gives: float32(f a + B) times float32(m), rounded."""
    steps = np.rint(np.float32(factor * total + int(bias)) * np.float32(multiplier))
    return min(max(int(steps) + zero_point, low), high)


def alike(scale, bias, step, zero_point, low, high, factor, reach, found):
    return all(
        code_of(a, scale, bias, step, zero_point, low, high)
        == kernel_code(a, factor, found.bias[0], found.multiplier[0], zero_point, low, high)
        for a in range(reach[0], reach[1] + 1)
    )


def one(scale, bias, step, zero_point, low, high, factor, reach, input_scale=1.0):
    return match(
        np.array([scale], np.float32), np.array([bias], np.float32), step, zero_point, low, high, factor,
        np.array([reach], np.float64), input_scale,
    )  # fmt: skip


float32s = st.floats(-6, 1).map(lambda x: float(np.float32(10.0**x)))
nice = st.sampled_from([0.25, 0.5, 1.0, 0.125, 3.0])


@settings(max_examples=300, deadline=None)
@given(
    scale=st.one_of(float32s, nice), step=st.one_of(float32s, nice),
    bias=st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 0.5, -0.75])), bits=st.integers(2, 5),
    zero=st.integers(0, 31), taken=st.integers(0, 31), factor=st.sampled_from([1, 2, 8, 16]),
    middle=st.integers(-300, 300), width=st.integers(0, 150), base=st.sampled_from([0, 0, 2**24, -(2**25), 2**27 + 1]),
    input_scale=st.one_of(st.just(1.0), float32s),
)  # fmt: skip
def test_exact_is_never_claimed_where_a_sum_in_reach_rounds_otherwise(
    scale, step, bias, bits, zero, taken, factor, middle, width, base, input_scale
):
    high = 2**bits - 1
    zero, low = min(zero, high), min(taken, high)
    reach = (base + middle - width, base + middle + width)
    if base:  # the boundaries among sums that float32 cannot tell apart
        bias = float(np.float32(-base * scale))
    found = one(scale, bias, step, zero, low, high, factor, reach, input_scale)
    if found.exact[0]:
        assert alike(scale, bias, step, zero, low, high, factor, reach, found)
        assert abs(int(found.bias[0])) + factor * max(map(abs, reach)) <= LARGEST
    weight_scale = found.scale[0]
    assert found.multiplier[0] == weight_scale * np.float32(input_scale) / np.float32(step)


@settings(max_examples=100, deadline=None)
@given(scale=st.one_of(float32s, nice), step=nice, bias=st.sampled_from([0.0, 0.5, -0.75, 1 / 3]),
       zero=st.integers(-4, 4))  # fmt: skip
def test_boundaries_are_the_first_sums_of_each_code(scale, step, bias, zero):
    bias = float(np.float32(bias))
    _, sums = boundaries(np.array([scale], np.float32), np.array([bias], np.float32), step, zero, -8, 7)
    for k, total in zip(range(-7, 8), sums[0], strict=True):
        assert code_of(int(total), scale, bias, step, zero, -100, 100) >= k
        assert code_of(int(total) - 1, scale, bias, step, zero, -100, 100) < k


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_random_layers_are_exact_at_few_bits(bits):
    random = np.random.default_rng(bits)
    channels, factor = 200, {2: 32, 3: 32, 4: 16}[bits]
    weights = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, 64))
    reach = np.stack([np.minimum(weights, 0).sum(1), np.maximum(weights, 0).sum(1)], 1) * (2**bits - 1.0)
    scale = random.uniform(0.5, 2, channels).astype(np.float32) * np.float32(0.01)
    spread = float(np.float32(6 * scale.mean() * 4 * (2 ** (bits - 1)) * 2 ** (bits - 1)))
    bias = random.normal(0, spread / 4, channels).astype(np.float32)
    zero = 2 ** (bits - 1)
    step = float(np.float32(spread / 2**bits))
    found = match(scale, bias, step, zero, 0, 2**bits - 1, factor, reach)
    assert found.exact.all()
    for channel in range(0, channels, 20):
        low, high = map(int, reach[channel])
        totals = np.arange(low, high + 1)
        mine = np.rint((factor * totals + found.bias[channel]).astype(np.float32) * found.multiplier[channel]) + zero
        twin = [code_of(int(a), scale[channel], bias[channel], step, zero, 0, 2**bits - 1) for a in totals]
        assert np.array_equal(np.clip(mine, 0, 2**bits - 1), twin)


def test_a_boundary_just_outside_the_reach_stays_outside():
    # every sum in reach gives code 1, and the sum 5 lies only a little above the boundary between 0 and 1
    scale, step, reach = 1.0, 100.0, (5, 6)
    bias = float(np.float32(50 - 5 + 0.4))
    found = one(scale, bias, step, 0, 0, 3, 1, reach)
    assert found.exact[0]
    assert alike(scale, bias, step, 0, 0, 3, 1, reach, found)


def test_sums_that_float32_cannot_tell_apart_are_not_called_exact():
    scale, bias, reach = 1.0, -float(2**25), (2**25, 2**25 + 8)
    found = one(scale, bias, 2.0, 0, 0, 3, 1, reach)
    # found.bias takes the sum back to small numbers, which is what makes this one exact
    assert found.exact[0] == alike(scale, bias, 2.0, 0, 0, 3, 1, reach, found)
    wide = one(1.0, 0.0, float(2**25 + 2**2), 0, 0, 3, 1, (0, 2**27))
    edges = boundaries(np.ones(1, np.float32), np.zeros(1, np.float32), float(2**25 + 4), 0, 0, 3)[1][0]
    around = [int(a) + i for a in edges for i in (-1, 0)]
    same = all(
        code_of(a, 1.0, 0.0, 2**25 + 4, 0, 0, 3) == kernel_code(a, 1, wide.bias[0], wide.multiplier[0], 0, 0, 3)
        for a in around
    )
    assert bool(wide.exact[0]) <= same


def test_biases_beyond_32_bits_do_not_fit_and_channels_of_zeros_do():
    found = one(1e-10, 1.0, 0.1, 0, 0, 15, 16, (-100, 100))
    assert not found.fit[0]
    assert not found.exact[0]
    silent = one(1e-10, 0.33, 0.1, 0, 0, 15, 16, (0, 0))
    assert silent.fit[0]
    assert silent.exact[0]
    assert kernel_code(0, 16, silent.bias[0], silent.multiplier[0], 0, 0, 15) == 3
