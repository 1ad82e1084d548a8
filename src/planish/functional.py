"""Pure tensor maths of uniform quantization: tensors in, tensors out.

The convention is that of ONNX QuantizeLinear: *divide* by the scale (multiplying by a reciprocal rounds differently
near ties) and round half to even, then add the zero point and clamp. Everything is computed in float32 or, for float64
inputs, in float64, whatever autocast says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """A uniform grid: the values (q - zero_point + offset) * scale for integer q in [qmin, qmax].

    `scale` and `zero_point` are float32 tensors that broadcast against the quantized tensor; the zero point holds
    integers. `offset` is 0.5 on the half-integer grid (no zero level), else 0.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    offset: float = 0.0


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Codes of `x`: clamp(round(x / scale - offset) + zero_point, qmin, qmax), round half to even.

    Args:
        x: floating-point tensor that the grid's tensors broadcast against.
        grid: the grid.

    Returns:
        Integer-valued tensor of the shape of x, float32 (float64 for float64 x).
    """
    return _rounded(x, grid).clamp_(grid.qmin, grid.qmax)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Values of the codes `q`: (q - zero_point + offset) * scale; the inverse of `quantize` on the grid's points."""
    steps = q - grid.zero_point
    return (steps + grid.offset if grid.offset else steps) * grid.scale


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Nearest grid value of each element of `x`, in the dtype of x.

    Equal to dequantize(quantize(x)) bit for bit. The gradient with respect to x is the straight-through estimator
    (Bengio et al. 2013, arXiv:1308.3432): 1 where the rounded code lies in [qmin, qmax], 0 where it is clipped. The
    grid receives no gradient. Non-finite inputs are not looked for: NaN stays NaN and infinities clip.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        value, _ = _StraightThrough.apply(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax, grid.offset)
        return value
    return dequantize(quantize(x, grid), grid).to(x.dtype)


def limits(grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest representable value, each of the shape of the grid's scale."""
    ends = (torch.full_like(grid.scale, q) for q in (grid.qmin, grid.qmax))
    low, high = (dequantize(q, grid) for q in ends)
    return low, high


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    """Codes before the clamp, as a fresh tensor."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    steps = x / grid.scale
    if grid.offset:
        steps = steps - grid.offset
    return steps.round() + grid.zero_point


class _StraightThrough(torch.autograd.Function):
    """Forward: fake quantization. Backward: the gradient where the code was not clipped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, offset: float) -> Any:
        grid = Grid(scale, zero_point, qmin, qmax, offset)
        codes = _rounded(x, grid)
        inside = (codes >= qmin) & (codes <= qmax)
        return dequantize(codes.clamp(qmin, qmax), grid).to(x.dtype), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        inside = output[1]
        ctx.mark_non_differentiable(inside)
        ctx.save_for_backward(inside)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _inside: Any = None) -> Any:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None, None
