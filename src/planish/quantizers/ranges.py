"""Setting the range of a grid: min-max, percentile, or the clip that leaves the least error.

Everything here works on *rows*: a (rows, values) matrix in which each row gets its own scale. `rows_of` turns a tensor
into rows by the format's granularity and says how the scales go back to broadcast against the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.functional import Grid
from planish.scheme import Format

# Scales stay in [SMALLEST, float32 max / 2^bits]. The floor keeps even half a step a normal number (subnormals are
# flushed to zero by some kernels); the ceiling keeps every code times the scale finite.
SMALLEST = 2.0**-120
PERCENTILE = 0.999  # each end is cut where this share of the values lies inside it
SAMPLE = 65_536  # values of a tensor that percentile and MSE look at when a format is per tensor or per token ...
ROW_SAMPLE = 1024  # ... but with several rows, at least this many of each
COARSE, FINE = 60, 24  # candidates of the clip search
DEEPEST = 1e-3  # smallest clip tried, as a share of the largest magnitude
CHUNK = 65_536  # values searched at once, so that the buffers stay in the cache


class Rows(NamedTuple):
    """`values` (R, N) in float32, and `restore`, which takes an (R,) tensor to the shape that broadcasts."""

    values: Tensor
    restore: Callable[[Tensor], Tensor]


def fit_grid(x: Tensor, format: Format, *, channel_axis: int = 0) -> Grid:
    """The grid of `format` for the values of `x`, its range set by the format's observer.

    Args:
        x: the tensor; weights have their output channels on `channel_axis`. "group" splits the flattened rest of
            each output channel into runs of `group_size`; "token" gives each row of dimension -2 its own scale.
        format: bits, granularity, symmetry and observer.
        channel_axis: the axis that "channel" and "group" do not share a scale over.

    Returns:
        A grid whose scale and zero point broadcast against x (for "group" they have the shape of x). Scales are
        positive and finite whatever x holds; affine grids always contain 0, and their zero point is 0 for x >= 0.

    Raises:
        PlanishError: x is empty or not finite, or its shape does not fit the granularity.
    """
    rows = rows_of(x.detach(), format, channel_axis)
    low, high = row_extremes(rows.values)
    scale, zero_point = fit_rows(rows.values, low, high, format)
    return Grid(rows.restore(scale), rows.restore(zero_point), format.qmin, format.qmax, format.offset)


def rows_of(x: Tensor, format: Format, channel_axis: int = 0) -> Rows:
    """View `x` as rows that share a scale; see `fit_grid` for arguments and errors."""
    shape = tuple(x.shape)
    if x.numel() == 0:
        raise PlanishError(f"cannot set a range from an empty tensor of shape {shape}: pass one with values.")
    x = x.float()
    if format.granularity == "tensor":
        return Rows(x.reshape(1, -1), lambda row: row.reshape(()))
    if format.granularity == "token":
        if x.ndim < 2:
            raise PlanishError(f"token granularity needs a (..., tokens, features) tensor, got shape {shape}.")
        return Rows(x.movedim(-2, 0).reshape(shape[-2], -1), lambda row: row.reshape(-1, 1))
    if not -x.ndim <= channel_axis < x.ndim:
        raise PlanishError(f"channel_axis {channel_axis} is outside a tensor of shape {shape}: pass one of its axes.")
    axis = channel_axis % x.ndim
    front = x.movedim(axis, 0)
    if format.granularity == "channel":
        broadcast = [-1 if dim == axis else 1 for dim in range(x.ndim)]
        return Rows(front.reshape(shape[axis], -1), lambda row: row.reshape(broadcast))
    size = format.group_size
    inputs = x.numel() // shape[axis]
    if inputs % size:
        raise PlanishError(
            f"{inputs} inputs per output channel (shape {shape}) do not split into groups of {size}: "
            f"choose a group_size that divides {inputs}."
        )
    return Rows(
        front.reshape(-1, size),
        lambda row: row.repeat_interleave(size).reshape(front.shape).movedim(0, axis).contiguous(),
    )


def row_extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, (R,) each; a PlanishError if any value is not finite."""
    low, high = torch.aminmax(values, dim=1)
    # NaN and infinity both reach an extreme, so the full count is only taken when it is needed.
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise PlanishError(
            f"cannot set a range: {bad} of {values.numel()} values are not finite in float32 (NaN or infinite); "
            "look for an overflow in the layer that made this tensor, or for a damaged checkpoint."
        )
    return low, high


def fit_rows(values: Tensor, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row, (R,) each, from its values (R, N) and its extremes (R,)."""
    if format.observer == "minmax":
        return grid_of_range(low, high, format)
    if format.granularity in ("tensor", "token"):
        values = subsample(values, sample_size(values.shape[0]))
    if format.observer == "percentile":
        return grid_of_range(*row_percentiles(values), format)
    return search_clip(values, low, high, format, power=2.4 if format.observer == "mse2.4" else 2.0)


def grid_of_range(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid just spans [low, high] and 0; elementwise, float32.

    Symmetric scales are the smallest that cover both ends: the code -2^(b-1) is used where the negative end is the
    larger one. Affine zero points are rounded, so an affine grid may miss an end by up to half a step.
    """
    # float64, because high - low overflows float32 for tensors near its largest number.
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if not format.symmetric:
        scale = (high - low) / (format.qmax - format.qmin)
    else:
        scale = torch.maximum(high / (format.qmax + format.offset), low / (format.qmin + format.offset))
    scale = scale.float().clamp(SMALLEST, torch.finfo(torch.float32).max / 2**format.bits)
    if format.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (format.qmin - low / scale.double()).round().clamp(format.qmin, format.qmax).float()


def row_percentiles(values: Tensor) -> tuple[Tensor, Tensor]:
    """The (1 - PERCENTILE) and PERCENTILE quantile of each row, (R,) each, linearly interpolated."""
    ordered = values.sort(dim=1).values
    place = PERCENTILE * (values.shape[1] - 1)
    below, part = int(place), place - int(place)
    above = min(below + 1, values.shape[1] - 1)
    high = ordered[:, below].lerp(ordered[:, above], part)
    low = ordered[:, -1 - below].lerp(ordered[:, -1 - above], part)
    return low, high


def search_clip(values: Tensor, low: Tensor, high: Tensor, format: Format, power: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row that leave the least sum of |error|^power.

    One number a row is searched: the share r of the largest magnitude M at which both ends are cut, so the candidate
    range is [max(low, -r M), min(high, r M)] and a short tail (of GELU, say) is kept while a long one is cut. A
    geometric series of COARSE shares comes first, then FINE ones around the best; r = 1 is min-max.
    """
    chunk = max(1, CHUNK // values.shape[1])
    parts = [
        _search_chunk(*rows, format, power)
        for rows in zip(values.split(chunk), low.split(chunk), high.split(chunk), strict=True)
    ]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search_chunk(values: Tensor, low: Tensor, high: Tensor, format: Format, power: float) -> tuple[Tensor, Tensor]:
    # Each row is brought to magnitude 1, so that powers of errors neither overflow nor vanish.
    largest = torch.maximum(low.abs(), high.abs()).clamp(min=SMALLEST)
    low, high = low / largest, high / largest
    values = values / largest[:, None]
    buffer = torch.empty_like(values)
    best, least = torch.ones_like(low), torch.full_like(low, math.inf)

    def offer(shares: Tensor) -> None:
        nonlocal best, least
        scale, zero_point = grid_of_range(torch.maximum(low, -shares), torch.minimum(high, shares), format)
        error = row_errors(values, scale, zero_point, format, power, buffer)
        better = error < least
        best, least = torch.where(better, shares, best), torch.where(better, error, least)

    step = DEEPEST ** (1 / (COARSE - 1))
    for i in range(COARSE):
        offer(torch.full_like(low, step**i))
    centre = best
    for i in range(FINE):
        offer((centre * step ** (2 * (i + 0.5) / FINE - 1)).clamp(max=1.0))
    cut = best.double() * largest.double()
    low, high = low.double() * largest.double(), high.double() * largest.double()
    return grid_of_range(torch.maximum(low, -cut), torch.minimum(high, cut), format)


def row_errors(
    values: Tensor, scale: Tensor, zero_point: Tensor, format: Format, power: float, buffer: Tensor
) -> Tensor:
    """Sum of |fake quantized - value|^power over each row of values (R, N); overwrites `buffer` (R, N)."""
    steps = torch.div(values, scale[:, None], out=buffer)
    if format.offset:
        steps.sub_(format.offset)
    if format.symmetric:
        codes = steps.round().clamp_(format.qmin, format.qmax)
    else:
        zero_point = zero_point[:, None]
        codes = steps.round().add_(zero_point).clamp_(format.qmin, format.qmax).sub_(zero_point)
    error = codes.sub_(steps)
    if power == 2.0:
        total = error.square_().sum(dim=1)
    else:
        total = error.abs_().pow_(power).sum(dim=1)
    return total * scale**power


def sample_size(rows: int, capacity: int = SAMPLE) -> int:
    """How many values of a tensor with so many rows are looked at."""
    return capacity if rows == 1 else max(capacity, rows * ROW_SAMPLE)


def subsample(values: Tensor, most: int) -> Tensor:
    """At most `most` values in all from the columns of (R, N) rows, taken at a fixed stride.

    The stride shares no factor with N: a stride that divides the number of features would see the same few features in
    every row of the tensor and miss an outlier channel.
    """
    count = values.shape[1]
    stride = -(-values.numel() // max(most, 1))
    if stride <= 1:
        return values
    while math.gcd(stride, count) != 1:
        stride += 1
    return values[:, ::stride].contiguous()
