"""Coded tensors for the tests, and integers multiplied one by one."""

import itertools

import numpy as np
import torch

from planish.deploy.arithmetic import IntegerProducts
from planish.deploy.integers import CodingTap
from planish.quantizers import ShiftedQuantizer, UniformQuantizer
from planish.scheme import Format

FORMATS = {
    "s8": Format(8, "channel"), "s4": Format(4, "channel"), "s3": Format(3),
    "half2": Format(2, "channel", half_integer=True),
    "half8": Format(8, half_integer=True), "u8": Format(8, symmetric=False), "u4": Format(4, symmetric=False),
}  # fmt: skip


def code(x, format, axis=0, products=None, site="x"):
    """The tensor, rounded to a grid fitted to it."""
    tap = UniformQuantizer(format, channel_axis=axis).fit(x)
    return CodingTap(tap, site, products or IntegerProducts())(x)


def code_shifted(x, format, before, after):
    tap = ShiftedQuantizer(format).fit(x + before)
    tap.before, tap.after = before, after
    return CodingTap(tap, "x", IntegerProducts())(x)


def random(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x + 0.3 * x.std()  # so that zero points are not in the middle


def scalar(coded):
    """The steps of a tensor as Python's integers would be, and the scale of one."""
    codes, zero, scale = (t.numpy() for t in (coded.codes, coded.zero_point, coded.scale))
    steps = codes.astype(np.int64) - zero
    if coded.offset:
        return 2 * steps + 1, (scale * np.float32(0.5)).astype(np.float32)
    return steps, scale


def rescale(acc, scale_a, scale_w, bias):
    """The order of MatMulIntegerToFloat, rounding to float32 after each operation."""
    out = np.float32(acc) * np.float32(np.float32(scale_a) * np.float32(scale_w))
    return out if bias is None else np.float32(out + np.float32(bias))


def linear(x, weight, bias=None):
    """``x`` (N, K), ``weight`` (M, K): one number at a time."""
    a, sa = scalar(x)
    w, sw = scalar(weight)
    out = np.zeros((len(a), len(w)), np.float32)
    for n, m in itertools.product(range(len(a)), range(len(w))):
        acc = sum(int(p) * int(q) for p, q in zip(a[n], w[m], strict=True))
        out[n, m] = rescale(acc, sa[n, 0], sw[m, 0], None if bias is None else bias[m])
    return torch.from_numpy(out)


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A convolution as its definition says; what lies outside of the image is the integer 0."""
    a, sa = scalar(x)
    w, sw = scalar(weight)
    count, _, height, width = a.shape
    out_channels, inner, kh, kw = w.shape
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((height, kh), (width, kw))]
    out = np.zeros((count, out_channels, *size), np.float32)
    for n, o, i, j in itertools.product(range(count), range(out_channels), range(size[0]), range(size[1])):
        first, acc = o // (out_channels // groups) * inner, 0
        for c, p, q in itertools.product(range(inner), range(kh), range(kw)):
            y, z = i * stride + p * dilation - padding, j * stride + q * dilation - padding
            if 0 <= y < height and 0 <= z < width:
                acc += int(a[n, first + c, y, z]) * int(w[o, c, p, q])
        out[n, o, i, j] = rescale(acc, sa.flat[0], sw[o, 0, 0, 0], None if bias is None else bias[o])
    return torch.from_numpy(out)


def conv_transpose2d(x, weight, bias=None, stride=1, padding=0, groups=1):
    """A transposed convolution: every input spreads its kernel over the output."""
    a, sa = scalar(x)
    w, sw = scalar(weight)
    count, channels, height, width = a.shape
    _, inner, kh, kw = w.shape
    size = [(n - 1) * stride - 2 * padding + k for n, k in ((height, kh), (width, kw))]
    acc = np.zeros((count, inner * groups, *size), np.int64)
    for n, c, i, j in itertools.product(range(count), range(channels), range(height), range(width)):
        first = c // (channels // groups) * inner
        for o, p, q in itertools.product(range(inner), range(kh), range(kw)):
            y, z = i * stride + p - padding, j * stride + q - padding
            if 0 <= y < size[0] and 0 <= z < size[1]:
                acc[n, first + o, y, z] += int(a[n, c, i, j]) * int(w[c, o, p, q])
    out = np.zeros(acc.shape, np.float32)
    for index in np.ndindex(acc.shape):
        o = index[1]
        out[index] = rescale(acc[index], sa.flat[0], sw[0, o % inner, 0, 0], None if bias is None else bias[o])
    return torch.from_numpy(out)
