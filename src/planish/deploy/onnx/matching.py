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

import numpy as np

STEPS = 24  # how many integer biases on either side of the nearest one are tried


@dataclass(frozen=True)
class Match:
    """Per output channel: the integer ``bias``, ``multiplier`` (the float that takes f a + B to output steps), and
    whether every boundary is ``exact``."""

    bias: np.ndarray
    multiplier: np.ndarray
    exact: np.ndarray


def boundaries(
    scale: np.ndarray, bias: np.ndarray, step: float, zero_point: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest integer sum whose output code is at least k, for k in low + 1 ... high.

    Args:
        scale, bias: (channels,): the network's own s and b.
        step, zero_point: grid of the output. low, high: the codes between which it stays.

    Returns:
        k - 1/2 - zero point, (codes,): where rounding changes, in output steps; and the integer sums (channels, codes).
        Computed in float64; the tie itself belongs to the even code, as in rounding half to even.
    """
    codes = np.arange(low + 1, high + 1, dtype=np.float64)
    edges = codes - 0.5 - zero_point
    s, b = scale.astype(np.float64)[:, None], bias.astype(np.float64)[:, None]
    exactly = (edges * step - b) / s
    sums = np.ceil(exactly)
    # round(k - 1/2) is k where k is even, so the boundary itself is inside; else it is outside
    tie = sums == exactly
    odd = (codes - zero_point) % 2 == 1
    return edges, sums + (tie & odd)


def match(
    scale: np.ndarray, bias: np.ndarray, step: float, zero_point: int, low: int, high: int, factor: int,
    reach: np.ndarray,
) -> Match:  # fmt: skip
    """B and m of the kernel for each output channel.

    Args:
        scale, bias: (channels,): a s + b is the float output for the integer sum a.
        step, zero_point, low, high: grid of the output.
        factor: f, by which the weights were multiplied.
        reach: (channels, 2): smallest and largest sum that can occur; boundaries beyond it say nothing.
    """
    edges, sums = boundaries(scale, bias, step, zero_point, low, high)
    relevant = (sums > reach[:, :1]) & (sums <= reach[:, 1:])
    nearest = np.rint(factor * bias.astype(np.float64) / scale)
    plain = scale.astype(np.float64) / (factor * step)
    candidates = nearest[:, None] + np.arange(-STEPS, STEPS + 1)
    # the kernel gives at least k for the sum N and not for N - 1: f (N - 1) + B < e u <= f N + B with u = 1 / m
    with np.errstate(divide="ignore", invalid="ignore"):
        first = (factor * (sums - 1)[:, None, :] + candidates[:, :, None]) / edges
        second = (factor * sums[:, None, :] + candidates[:, :, None]) / edges
    small, large = np.minimum(first, second), np.maximum(first, second)
    ignored = ~relevant[:, None, :]
    small = np.where(ignored, -np.inf, small).max(-1, initial=0.0)
    large = np.where(ignored, np.inf, large).min(-1, initial=np.inf)
    # among the biases that leave room, the one with the widest; no boundary at all leaves the plain numbers
    wish = (1 / plain)[:, None]
    with np.errstate(invalid="ignore"):
        room = np.where(np.isinf(large), np.inf, (large - small) / wish)
    best = np.where(relevant.any(-1), room.argmax(-1), STEPS)
    pick = np.arange(len(scale))
    u_low, u_high = small[pick, best], large[pick, best]
    exact = room[pick, best] > 1e-6  # float32 has to be able to tell the two ends apart
    # as near to the network's own number as a quarter of the room from either end allows
    bounded = ~np.isinf(u_high)
    quarter = np.where(bounded, u_high, 0) / 4 - np.where(bounded, u_low, 0) / 4
    middle = np.maximum(wish[:, 0], u_low + quarter)
    middle = np.where(bounded, np.minimum(middle, u_high - quarter), middle)
    free = ~relevant.any(-1)
    bias_out = np.where(exact & ~free, candidates[pick, best], nearest)
    multiplier = np.where(exact & ~free, 1 / middle, plain)
    return Match(bias_out.astype(np.int64), multiplier, exact | free)
