"""Round one half of a weight's columns after another: the second step ("Wqer") of ERQ.

Zhong et al. 2024, arXiv 2407.06794, section 4.3: the roundings of one half are refined, and the columns that are left
make up for its error by ridge regression; then half of these are rounded, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planish.functional import Grid, dequantize, quantize
from planish.ptq.ridge import solve_ridge


def refine_roundings(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, flips: int) -> Tensor:
    """Move single codes by one while that lowers the error of the output.

    With d = rounded weight - weight, a row's error is d H d^T. In each row the code is moved that lowers it most,
    against the sign of its gradient, until none does. (ERQ moves those with the largest gradients and only between the
    two neighbours of the weight; the decrease itself is as cheap to have.)

    Args:
        weight: (G, R, K), float64.
        codes: points of the grid to begin with, (G, R, K).
        hessian: (G, K, K), float64, symmetric.
        grid: with tensors that broadcast against ``weight``.
        flips: moves in a row, at most.

    Returns:
        The codes, of the shape of ``weight``.
    """
    codes, scale = codes.clone(), grid.scale.double().expand_as(weight)
    d = dequantize(codes, grid) - weight
    slope = d @ hessian
    curvature = scale.square() * hessian.diagonal(dim1=1, dim2=2)[:, None]
    for _ in range(flips):
        step = -slope.sign()
        inside = (codes + step >= grid.qmin) & (codes + step <= grid.qmax)
        gain, where = torch.where(inside, curvature - 2 * scale * slope.abs(), 0.0).min(-1, keepdim=True)
        change = torch.where(gain < 0, step.gather(-1, where), 0.0)
        if not change.any():
            break
        codes.scatter_add_(-1, where, change)
        moved = change * scale.gather(-1, where)
        slope += moved * hessian.gather(1, where.expand(-1, -1, hessian.shape[-1]))
    return codes


def halves_round(
    weight: Tensor, hessian: Tensor, grid: Grid, *, lam: float = 0.01, flips: int = 100, act_order: bool = True
) -> Tensor:
    """Points of the grid for ``weight`` whose product with the inputs is near the one of the weight.

    Args:
        weight: (G, R, K): groups, output channels, inputs of a group.
        hessian: (G, K, K), symmetric and positive semidefinite; its scale does not matter.
        grid: with tensors that broadcast against ``weight``.
        lam: of the ridge, as a share of the mean diagonal.
        flips: roundings that are changed in a row of each half, at most.
        act_order: the columns with the largest inputs first; else from left to right.

    Returns:
        The shape of ``weight``, float32, on the grid.
    """
    hessian = hessian.double()
    order = torch.arange(weight.shape[-1], device=weight.device).expand(len(weight), -1)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
    rows = hessian.gather(1, order[:, :, None].expand_as(hessian))
    hessian = rows.gather(2, order[:, None].expand_as(rows))

    def ordered(x: Tensor) -> Tensor:
        return x.expand(weight.shape).gather(2, order[:, None].expand(weight.shape))

    w, scale, zero = ordered(weight.double()), ordered(grid.scale), ordered(grid.zero_point)
    codes = torch.empty_like(w)
    start, count = 0, w.shape[-1]
    while start < count:
        end = start + (count - start + 1) // 2
        part, rest = slice(start, end), slice(end, count)
        own = grid._replace(scale=scale[..., part], zero_point=zero[..., part])
        codes[..., part] = refine_roundings(
            w[..., part], quantize(w[..., part], own), hessian[:, part, part], own, flips
        )
        if end < count:
            error = w[..., part] - dequantize(codes[..., part], own)
            w[..., rest] += solve_ridge(hessian[:, rest, rest], error @ hessian[:, part, rest], lam, ones=False)
        start = end
    back = torch.empty_like(codes).scatter_(2, order[:, None].expand(weight.shape), codes)
    return dequantize(back.float(), grid)
