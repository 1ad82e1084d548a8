"""Randomness that depends on what is drawn for, not on when: one key a sample and epoch.

Drawing from a generator would make a sample's augmentation depend on all samples drawn before it, and so on the number
of workers and on where a run was interrupted. A counter-based hash does not.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """``count`` uniform 64-bit numbers for each sample, a pure function of (seed, epoch, index).

    Args:
        indices: integers, shape ``(n,)``.

    Returns:
        uint64, shape ``(n, count)``.
    """
    golden = np.uint64(_GOLDEN)
    state = _mix(np.array([(seed + _GOLDEN) & _MASK], np.uint64))
    state = _mix(state + np.array([epoch + 1], np.uint64) * golden)
    state = _mix(state + (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * golden)
    return _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * golden)


def generator_for(seed: int, epoch: int, index: int) -> torch.Generator:
    """A CPU generator of its own for one sample, a pure function of (seed, epoch, index)."""
    return torch.Generator().manual_seed(int(draw(seed, epoch, np.array([index]), 1)[0, 0] >> np.uint64(1)))
