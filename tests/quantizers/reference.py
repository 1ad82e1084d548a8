"""Reference twin: uniform quantization written out one number at a time, from the definition.

q = clamp(round_half_even(x / s - offset) + z, qmin, qmax),  x' = (q - z + offset) * s, every step rounded to float32.
"""

import numpy as np
import torch


def codes(x, grid):
    """Codes of `x` one element at a time, and whether each was inside the clip range."""
    scale = grid.scale.expand_as(x).reshape(-1).numpy()
    zero = grid.zero_point.expand_as(x).reshape(-1).numpy()
    out, inside = [], []
    with np.errstate(over="ignore"):
        for value, s, z in zip(x.reshape(-1).numpy(), scale, zero, strict=True):
            step = np.float32(np.float32(value) / s)
            step = np.float32(step - np.float32(grid.offset))
            code = np.float32(np.rint(step) + z)  # rint rounds half to even
            inside.append(bool(grid.qmin <= code <= grid.qmax))
            out.append(min(max(code, grid.qmin), grid.qmax))
    return torch.tensor(np.array(out, np.float32)).reshape(x.shape), torch.tensor(inside).reshape(x.shape)


def values(q, grid):
    """Values of codes, one element at a time."""
    scale = grid.scale.expand_as(q).reshape(-1).numpy()
    zero = grid.zero_point.expand_as(q).reshape(-1).numpy()
    out = [
        np.float32(np.float32(np.float32(code - z) + np.float32(grid.offset)) * s)
        for code, s, z in zip(q.reshape(-1).numpy(), scale, zero, strict=True)
    ]
    return torch.tensor(np.array(out, np.float32)).reshape(q.shape)


def minmax(numbers, format):
    """Scale and zero point that span the numbers and 0, in Python floats (float64)."""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    if format.symmetric:
        return max(high / (format.qmax + format.offset), low / (format.qmin + format.offset)), 0
    scale = (high - low) / (2**format.bits - 1)
    return scale, round(-low / scale) if scale else 0


def groups(x, format, channel_axis=0):
    """The lists of numbers that share a scale, in the order of the scales."""
    if format.granularity == "tensor":
        return [x.reshape(-1).tolist()]
    if format.granularity == "token":
        return [x.select(-2, i).reshape(-1).tolist() for i in range(x.shape[-2])]
    channels = [x.select(channel_axis, i).reshape(-1).tolist() for i in range(x.shape[channel_axis])]
    if format.granularity == "channel":
        return channels
    size = format.group_size
    return [channel[i : i + size] for channel in channels for i in range(0, len(channel), size)]


def error(numbers, scale, zero, format, power):
    """Sum of |fake-quantized - number|^power in Python floats."""
    total = 0.0
    for number in numbers:
        code = min(max(round(number / scale - format.offset) + zero, format.qmin), format.qmax)
        total += abs((code - zero + format.offset) * scale - number) ** power
    return total
