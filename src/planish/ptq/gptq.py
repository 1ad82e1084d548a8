"""GPTQ: round a weight column by column, and let the columns that are left make up for the error.

Frantar et al. 2022, arXiv 2210.17323, after optimal brain quantization (Frantar and Alistarh 2022, arXiv 2208.11580).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.functional import Grid, dequantize, quantize
from planish.network import Site, detach, taps_of
from planish.ptq.halves import halves_round
from planish.ptq.layers import LayerCall, layer_weights, parameter_at
from planish.ptq.outputs import keep_float
from planish.ptq.passes import Calibration
from planish.ptq.ridge import RidgeCorrection, moments
from planish.ptq.rounding import Round
from planish.ptq.walk import check_memory, peek, visit_layers

INPUTS = ("quantized", "float")
SOLVERS = ("columns", "halves")


def gptq_round(
    weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float = 0.01, act_order: bool = True, block: int = 128
) -> Tensor:
    """Points of the grid for ``weight`` whose product with the inputs is near the one of the weight.

    Column after column is rounded to nearest; its error, divided by the diagonal of the inverse Hessian of the columns
    that are left, is fed back into these (equation 2). The rows of the inverses are those of the upper Cholesky factor
    of the whole inverse (section 3.3).

    Args:
        weight: (G, R, K): groups, output channels, inputs of a group.
        hessian: (G, K, K), symmetric and positive semidefinite; its scale does not matter.
        grid: with tensors that broadcast against ``weight``.
        damp: added to the diagonal, as a share of its mean.
        act_order: the columns with the largest diagonal first; else from left to right.
        block: columns whose feedback into the columns after them is put off and done at once.

    Returns:
        The shape of ``weight``, float32, on the grid. A column whose input is always zero is rounded to nearest.
    """
    hessian = hessian.double()
    order = torch.arange(weight.shape[-1], device=weight.device).expand(len(weight), -1)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=-1, descending=True, stable=True)
    rows = hessian.gather(1, order[:, :, None].expand_as(hessian))
    factor = _inverse_factor(rows.gather(2, order[:, None].expand_as(rows)), damp)

    def ordered(x: Tensor) -> Tensor:
        return x.expand(weight.shape).gather(2, order[:, None].expand(weight.shape))

    w, scale, zero = ordered(weight.double()), ordered(grid.scale), ordered(grid.zero_point)
    codes = torch.empty_like(w)
    for start in range(0, w.shape[-1], block):
        end = min(start + block, w.shape[-1])
        errors = torch.zeros_like(w[..., start:end])
        for i in range(start, end):
            column = grid._replace(scale=scale[..., i], zero_point=zero[..., i])
            codes[..., i] = quantize(w[..., i], column)
            error = (w[..., i] - dequantize(codes[..., i], column)) / factor[:, i, i, None]
            w[..., i:end] -= error[..., None] * factor[:, i, None, i:end]
            errors[..., i - start] = error
        w[..., end:] -= errors @ factor[:, start:end, end:]
    back = torch.empty_like(codes).scatter_(2, order[:, None].expand(weight.shape), codes)
    return dequantize(back.float(), grid)


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper triangular U (G, K, K) with U^T U = the inverse of the damped Hessian."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    alive = (diagonal > 0).sum(-1, keepdim=True)  # an input that is always zero has zeros in all its row
    mean = diagonal.sum(-1, keepdim=True) / alive.clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    while True:
        damped = hessian + torch.diag_embed((damp * mean).expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return upper
        damp *= 10  # float64 cannot resolve so little


@dataclass(frozen=True)
class GPTQ:
    """Round the weights by GPTQ, in the order of execution, on the grids that the scheme's observer sets.

    The Hessian of the squared error of a layer's output is 2 X X^T (equation 1), summed over the batches. Products
    other than linear layers and convolutions, and weights that are computed from parameters, are rounded to nearest,
    which the log says.

    Attributes:
        damp: added to the diagonal of the Hessian, as a share of its mean.
        act_order: round the columns with the largest inputs first.
        inputs: "quantized": the layer's inputs as the quantized layers before it give them; "float": those of the float
            network.
        block: columns that are rounded before the others hear of it; it changes the time, not the result.
        ridge: before a layer is rounded, move its weight by this correction towards the float network's output, whose
            inputs then are those that the *rounded* layers before it give.
        solver: "columns": GPTQ; "halves": ERQ's, which rounds half of the columns that are left at a time and refines
            their roundings (``ptq/halves.py``).
        robust: give columns of the inputs less weight that are longer than the median column (``ptq/ridge.py``); with
            ``ridge``, that decides.
        memory: gigabytes of outputs of blocks that are held in memory; beyond it, in temporary files.

    Raises:
        PlanishError: an option has no meaning, or inputs of a layer are not finite.
    """

    damp: float = 0.01
    act_order: bool = True
    inputs: str = "quantized"
    block: int = 128
    ridge: RidgeCorrection | None = None
    solver: str = "columns"
    robust: bool = False
    memory: float = 4.0

    name = "gptq"

    def __post_init__(self) -> None:
        check_memory(self.name, self.memory)
        if not 0 < self.damp < math.inf:
            raise PlanishError(f"gptq: damp is {self.damp}: give a share of the mean diagonal above 0, such as 0.01")
        if self.inputs not in INPUTS:
            raise PlanishError(f"gptq: inputs is {self.inputs!r}: choose one of {', '.join(INPUTS)}")
        if self.solver not in SOLVERS:
            raise PlanishError(f"gptq: solver is {self.solver!r}: choose one of {', '.join(SOLVERS)}")
        if self.block < 1:
            raise PlanishError(f"gptq: block is {self.block}: give a number of columns, at least 1")
        if self.ridge is not None and self.inputs == "float":
            raise PlanishError("gptq: ridge corrects for quantized inputs: leave it out or set inputs='quantized'")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        keep_float(calibration)
        weights = {site.name: site for site, _ in calibration.assignment.quantized() if site.is_weight}
        present: dict[str, Any] = dict(taps_of(calibration.model))
        if not all(getattr(present.get(name), "fitted", False) for name in weights):
            Round()(calibration)
        rounded = self._walk(
            calibration, {n: site for n, site in layer_weights(calibration.assignment).items() if n in weights}
        )
        left = [name for name in weights if name not in rounded]
        if left:
            text = f"{len(left)} of {len(weights)} weights are rounded to nearest instead: {', '.join(left[:3])}"
            calibration.note(self.name, text + (", ..." if left[3:] else ""))

    def _walk(self, calibration: Calibration, wanted: Mapping[str, Site]) -> set[str]:
        """Round the wanted weights, layer by layer; returns which were reached."""
        model = calibration.model
        taps: dict[str, Any] = dict(taps_of(model))
        twin = copy.deepcopy(model)
        detach(twin)

        def decide(site: str, calls: Iterable[tuple[LayerCall, ...]]) -> None:
            parameter, grid = parameter_at(model, wanted[site]), taps[site].grid
            (call, *_), calls = peek(calls)
            if self.ridge is None:
                hessian = moments(((of_all[0], None) for of_all in calls), robust=self.robust).inputs
            else:
                hessian = self.ridge.correct(model, wanted[site], calls).inputs
            grid = grid._replace(scale=call.matrix(grid.scale), zero_point=call.matrix(grid.zero_point))
            values = self._round(call.matrix(parameter), hessian, grid)
            parameter.copy_(call.from_matrix(values))

        networks = [twin] if self.inputs == "float" else [model] if self.ridge is None else [model, twin]
        products, batches = calibration.assignment.products, calibration.batches
        return visit_layers(networks, products, batches, wanted, decide, memory=self.memory)

    def _round(self, weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
        if self.solver == "halves":
            return halves_round(weight, hessian, grid, lam=self.damp, act_order=self.act_order)
        return gptq_round(weight, hessian, grid, damp=self.damp, act_order=self.act_order, block=self.block)
