"""Make an integer kernel round exactly as the formula in float does.

A kernel such as ONNX Runtime's QLinearConv adds an *integer* bias to its sum of integer products, multiplies by one
float and rounds: round((f a + B) m). The network's own formula is round((a s + b) / t) with a float bias b; rounding b
to a multiple of s moves many sums across a rounding boundary when s is not small against the step t of the output,
which is so at few bits. But the sum a is an integer, so only on which side of each boundary every *integer* falls
matters, and an output of b bits has only 2^b - 1 boundaries: B and m are chosen so that all of them fall as they
should. The weights are multiplied by a whole number f first, as far as eight bits hold them, so that B has finer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

STEPS = 24  # how many integer biases on either side of the nearest one are tried
LARGEST = 2**31 - 1  # the sum of products and the bias are held in 32 signed bits
FAR = 2.0**52  # no sum of products comes so far


@dataclass(frozen=True)
class Match:
    """Per output channel: the integer ``bias``, the ``scale`` of the weights (float32) that gives the kernel its
    ``multiplier`` (float32: takes f a + B to output steps), whether every boundary is ``exact``, and whether bias and
    sum ``fit`` in 32 bits: without that the kernel cannot be used."""

    bias: np.ndarray
    scale: np.ndarray
    multiplier: np.ndarray
    exact: np.ndarray
    fit: np.ndarray


def boundaries(
    scale: np.ndarray, bias: np.ndarray, step: float, zero_point: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest integer sum whose output code is at least k, for k in low + 1 ... high.

    Args:
        scale, bias: (channels,): the network's own s and b.
        step, zero_point: grid of the output. low, high: the codes between which it stays.

    Returns:
        k - 1/2 - zero point, (codes,): where rounding changes, in output steps; and the integer sums (channels, codes),
        exact as long as they are below 2^52. The tie itself belongs to the even code, as in rounding half to even.
    """
    codes = np.arange(low + 1, high + 1, dtype=np.float64)
    edges = codes - 0.5 - zero_point
    s, b = scale.astype(np.float64)[:, None], bias.astype(np.float64)[:, None]
    exactly = np.clip((edges * step - b) / s, -FAR, FAR)
    sums = np.ceil(exactly)
    # round(k - 1/2) is k where k is even, so the boundary itself is inside; else it is outside
    odd = (codes - zero_point) % 2 == 1
    sums += (sums == exactly) & odd
    # float64 cannot tell on which side of an integer these lie
    near = np.abs(exactly - np.rint(exactly)) <= 2.0**-50 * (np.abs(exactly) + np.abs(b / s) + 1)
    for channel, k in np.argwhere(near & (np.abs(exactly) < LARGEST)):
        precise = (Fraction(edges[k]) * Fraction(step) - Fraction(b[channel, 0])) / Fraction(s[channel, 0])
        sums[channel, k] = -(-precise // 1) + (precise.denominator == 1 and odd[k])
    return edges, sums


def match(
    scale: np.ndarray, bias: np.ndarray, step: float, zero_point: int, low: int, high: int, factor: int,
    reach: np.ndarray, input_scale: float = 1.0,
) -> Match:  # fmt: skip
    """B and m of the kernel for each output channel.

    Args:
        scale, bias: (channels,): a s + b is the float output for the integer sum a.
        step, zero_point, low, high: grid of the output; ``step`` a float32 number.
        factor: f, by which the weights were multiplied.
        reach: (channels, 2): smallest and largest sum that can occur; boundaries beyond it only have to stay beyond it.
        input_scale: of the activations, a float32 number.
    """
    edges, sums = boundaries(scale, bias, step, zero_point, low, high)
    inside, outside = _neighbours(sums, reach)
    silent = np.all(reach == 0, axis=1)  # a channel whose weights are zero: its sum says nothing, so the bias is free
    plain = np.where(silent, 1.0, scale.astype(np.float64) / (factor * step))
    nearest = np.rint(bias.astype(np.float64) / (plain * step))
    candidates = nearest[:, None] + np.arange(-STEPS, STEPS + 1)
    u_low, u_high = _room(edges, inside, outside, candidates, factor)
    # among the biases that leave room, the one with the widest; no boundary at all leaves the plain numbers
    wish = (1 / plain)[:, None]
    with np.errstate(invalid="ignore"):
        room = np.where(np.isinf(u_high), -np.inf, (u_high - u_low) / wish)
    best = np.where(silent | ~np.isfinite(room).any(-1), STEPS, room.argmax(-1))
    pick = np.arange(len(scale))
    u_low, u_high, room = u_low[pick, best], u_high[pick, best], room[pick, best]
    # as near to the network's own number as a quarter of the room from either end allows
    quarter = np.where(room > 0, u_high / 4 - u_low / 4, 0)
    middle = np.where(room > 0, np.clip(wish[:, 0], u_low + quarter, u_high - quarter), wish[:, 0])
    free = silent | ~(room > 0)
    chosen = np.where(free, nearest, candidates[pick, best])
    weight_scale = (np.where(free, plain, 1 / middle) * step / input_scale).astype(np.float32)
    # as the kernel computes it: every step in float32
    multiplier = weight_scale * np.float32(input_scale) / np.float32(step)
    fit = np.abs(chosen) + factor * np.abs(reach).max(-1) <= LARGEST
    exact = fit & _rounds_alike(edges, inside, outside, factor, chosen, multiplier)
    return Match(np.where(fit, chosen, 0).astype(np.int64), weight_scale, multiplier, exact, fit)


def _neighbours(sums: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each boundary the smallest sum in reach that has passed it, and the largest one that has not; NaN if none."""
    low, high = reach[:, :1], reach[:, 1:]
    inside = np.where(sums <= high, np.maximum(sums, low), np.nan)
    return inside, np.where(sums > low, np.minimum(sums - 1, high), np.nan)


def _room(
    edges: np.ndarray, inside: np.ndarray, outside: np.ndarray, candidates: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Between which u = 1 / m all boundaries hold, for each channel and bias: (channels, candidates) twice.

    The sum N rounds to k or more where f N + B >= e u, and to less where f N + B < e u.
    """
    passed = (factor * inside[:, None, :] + candidates[:, :, None]) / edges  # at least u where the edge e is positive
    failed = (factor * outside[:, None, :] + candidates[:, :, None]) / edges
    positive = edges > 0
    ends = np.where(positive, failed, passed), np.where(positive, passed, failed)
    low = np.where(np.isnan(ends[0]), -np.inf, ends[0]).max(-1, initial=0.0)
    return low, np.where(np.isnan(ends[1]), np.inf, ends[1]).min(-1, initial=np.inf)


def _rounds_alike(
    edges: np.ndarray, inside: np.ndarray, outside: np.ndarray, factor: int, bias: np.ndarray, multiplier: np.ndarray
) -> np.ndarray:
    """Whether the kernel's own arithmetic puts the sums next to each boundary on its right side, for each channel.

    Rounding an integer to float32, multiplying and rounding are all monotone, so the sums further away follow.
    """

    def codes(sums: np.ndarray) -> np.ndarray:
        exactly = factor * sums + bias[:, None]
        return np.asarray(np.rint(exactly.astype(np.float32) * multiplier[:, None]))

    with np.errstate(over="ignore"):
        passed = np.isnan(inside) | (codes(inside) >= edges)
        failed = np.isnan(outside) | (codes(outside) < edges)
    return np.asarray((passed & failed).all(-1))
