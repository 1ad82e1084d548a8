"""Constants in half precision: what beside the codes of the weights makes a quantized network large."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from planish.errors import PlanishError
from planish.functional import dequantize, quantize
from planish.network.coverage import Assignment, read_through_its_tap
from planish.network.taps import taps_of
from planish.quantizers import UniformQuantizer

CONSTANTS = ("float", "half")
LEAST = 16  # numbers that a constant must have: fewer take no room


def check_constants(constants: str) -> None:
    """Raise :class:`PlanishError` if there is no such choice."""
    if constants not in CONSTANTS:
        raise PlanishError(f"constants is {constants!r}: choose one of {', '.join(CONSTANTS)}")


def rounded(values: Tensor) -> Tensor | None:
    """The nearest half-precision numbers as float32; ``None`` where some are out of range or far from their value.

    Half precision has 11 bits between 2^-14 and 65504. Below, numbers may lose as much as 2^-11 of the largest of the
    tensor, but where all are positive, as scales are, each has to keep 2^-11 of itself.
    """
    near, sizes = values.half().float(), values.abs()
    allowed = (sizes if bool((values > 0).all()) else sizes.amax()) * 2.0**-11
    return near if bool(near.isfinite().all() and ((near - values).abs() <= allowed).all()) else None


@torch.no_grad()
def round_constants(model: nn.Module, plan: Assignment | None) -> int:
    """Round the constants of a model to half precision, in place and still held in float32; how many tensors changed.

    Rounded are the float32 parameters and buffers of at least ``LEAST`` numbers, with two exceptions. Quantized
    weights, which a file holds as codes, become the values of the same codes on the rounded grid (those that another
    module reads, too, stay as they are). BatchNorm stays: what folding leaves of it computes nothing, its variance is
    one minus its epsilon, and half precision has no such number.

    Args:
        plan: of what is quantized; ``None`` for a model in float.
    """
    taps = dict(taps_of(model))
    coded: list[tuple[nn.Parameter, UniformQuantizer, Tensor]] = []
    left: set[int] = set()
    for site, _ in plan.quantized() if plan is not None else ():
        weight = model.get_submodule(site.owner)._parameters[site.slot] if site.parameter else None
        if weight is not None and isinstance(tap := taps[site.name], UniformQuantizer):
            left.add(id(weight))
            if plan is not None and read_through_its_tap(model, site, plan):
                coded.append((weight, tap, quantize(weight, tap.grid)))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    left |= {id(tensor) for norm in norms for tensor in (*norm.parameters(), *norm.buffers())}
    changed = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.float32 and tensor.numel() >= LEAST and id(tensor) not in left:
            near = rounded(tensor)
            if near is not None and not torch.equal(near, tensor):
                tensor.copy_(near)
                changed += 1
    for weight, tap, codes in coded:
        weight.copy_(dequantize(codes, tap.grid))
    return changed
