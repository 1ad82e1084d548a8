"""Constants in half precision: what beside the codes makes a small file large.

Position embeddings, biases, norms and scales are a tenth of a small 4-bit transformer when they are stored in float32.
Rounded to half precision they change by at most 2^-11 of themselves, far less than a step of the quantizers.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from planish.deploy.onnx.edit import Editor, constant
from planish.functional import dequantize, quantize
from planish.network import taps_of
from planish.quantizers import UniformQuantizer

LEAST = 16  # numbers that a constant must have: a cast takes about a hundred bytes itself


def rounded(values: Tensor) -> Tensor | None:
    """The nearest half-precision numbers as float32; ``None`` where some are out of range or far from their value.

    Half precision has 11 bits between 2^-14 and 65504. Below, numbers may lose as much as 2^-11 of the largest of the
    tensor, but where all are positive, as scales are, each has to keep 2^-11 of itself.
    """
    near, sizes = values.half().float(), values.abs()
    allowed = (sizes if bool((values > 0).all()) else sizes.amax()) * 2.0**-11
    return near if bool(near.isfinite().all() and ((near - values).abs() <= allowed).all()) else None


@torch.no_grad()
def in_half(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of the model with its constants rounded to half precision, and how many tensors changed.

    Rounded are the float32 parameters and buffers of at least ``LEAST`` numbers, with two exceptions. Quantized
    weights, which the file holds as codes, become the values of the same codes on the rounded grid. BatchNorm stays:
    what folding leaves of it computes nothing, its variance is one minus its epsilon, and half precision has no such
    number.
    """
    twin, changed = copy.deepcopy(model), 0
    plan, taps = getattr(twin, "planish_assignment", None), dict(taps_of(twin))
    coded: list[tuple[nn.Parameter, UniformQuantizer, Tensor]] = []
    for site, _ in plan.quantized() if plan is not None else ():
        weight = twin.get_submodule(site.owner)._parameters[site.slot] if site.parameter else None
        if weight is not None and isinstance(tap := taps[site.name], UniformQuantizer):
            coded.append((weight, tap, quantize(weight, tap.grid)))
    left = {id(weight) for weight, _, _ in coded}
    norms = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    left |= {id(tensor) for norm in norms for tensor in (*norm.parameters(), *norm.buffers())}
    for tensor in [*twin.parameters(), *twin.buffers()]:
        if tensor.dtype == torch.float32 and tensor.numel() >= LEAST and id(tensor) not in left:
            near = rounded(tensor)
            if near is not None and not torch.equal(near, tensor):
                tensor.copy_(near)
                changed += 1
    for weight, tap, codes in coded:
        weight.copy_(dequantize(codes, tap.grid))
    return twin, changed


def store_half(graph: ir.Graph) -> None:
    """Store in half precision what half precision holds exactly; a Cast, folded when the file is loaded, widens it."""
    editor = Editor(graph)
    first = next(iter(graph))
    for value in list(graph.initializers.values()):
        numbers = constant(value)
        if numbers is None or numbers.dtype != np.float32 or numbers.size < LEAST or value in graph.outputs:
            continue
        with np.errstate(over="ignore"):
            narrow = numbers.astype(np.float16)
        if not np.array_equal(narrow.astype(np.float32), numbers):
            continue
        name, users = str(value.name), list(value.uses())
        stored = editor.constant(narrow, f"{name}.half")
        attributes = {"to": ir.DataType.FLOAT}
        wide = editor.node(
            first, "Cast", [stored], name=f"{name}.cast", like=value, dtype=ir.DataType.FLOAT, attributes=attributes
        )
        for node, index in users:
            node.replace_input_with(index, wide)
    editor.sweep()
