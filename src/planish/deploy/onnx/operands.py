"""The operands of a product that come out of quantizers, and whether integer kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.edit import attribute, constant
from planish.deploy.onnx.graph import NODE
from planish.deploy.onnx.grids import NodeGrid, read_grid
from planish.deploy.onnx.tidy import MOVES
from planish.deploy.onnx.weights import WeightCodes

# what can be done to codes as well as to their values
KEPT = (*MOVES, "MaxPool")


@dataclass
class Operand:
    """The quantizer that an operand comes from, the weight's integers if it is one, and the nodes between the quantizer
    of an activation and the product, first one first, which only move numbers."""

    node: ir.Node
    grid: NodeGrid
    weight: WeightCodes | None = None
    moves: tuple[ir.Node, ...] = ()

    @property
    def product(self) -> str:
        """The name of the layer or of the product, from the site's."""
        return product_of(self.grid.site)


def product_of(site: str) -> str:
    """The name of the layer or of the product that a site belongs to."""
    owner, _, slot = site.rpartition(".")
    if slot in ("weight", "input", "in_proj_weight"):
        return owner or slot
    return f"{owner}.{slot.rpartition('_')[0] or slot}".lstrip(".")


def operand_of(value: ir.Value | None) -> Operand | None:
    """The operand behind a value; ``None`` if it comes from no quantizer."""
    moves: list[ir.Node] = []
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in KEPT and len(producer.outputs) == 1:
        moves.insert(0, producer)
        inner = producer.inputs[0]
        producer = None if inner is None else inner.producer()
    if producer is None or producer.op_type != NODE:
        return None
    grid, values = read_grid(producer), constant(producer.inputs[0])
    if values is None:
        return Operand(producer, grid, None, tuple(moves))
    if len(moves) > 1 or any(move.op_type != "Transpose" for move in moves):
        return None
    permutation = attribute(moves[0], "perm") if moves else None
    return Operand(producer, grid, WeightCodes.of(values, grid, permutation))


def usable(grid: NodeGrid) -> bool:
    """Whether an activation's grid is one that integer kernels take."""
    return grid.per_tensor and grid.qmax - grid.qmin <= 255 and grid.qmin <= float(grid.zero_point.item()) <= grid.qmax


def per_head(node: ir.Node, left: Operand | None, right: Operand | None) -> bool:
    """Whether the first of two activations has a scale for each head: every head is a product of its own, scaled at
    the end."""
    if node.op_type != "MatMul" or left is None or right is None or left.weight or right.weight or left.moves:
        return False
    grid = left.grid
    alone = grid.scale.ndim > 2 and grid.scale.size == grid.scale.shape[-3] > 1  # nothing differs along the sum
    level = np.unique(grid.zero_point)
    return alone and not grid.offset and len(level) == 1 and grid.qmin <= level[0] <= grid.qmax and usable(right.grid)


def obstacle(node: ir.Node, left: Operand | None, right: Operand | None) -> str:
    """Why a product cannot run on integers; empty if it can."""
    if left is None or right is None:
        return f"its {'first' if left is None else 'second'} operand is not quantized next to it"
    if per_head(node, left, right):
        return ""
    for operand in (left, right):
        grid, weight = operand.grid, operand.weight
        if weight is None and not usable(grid):
            level = " without a zero level" if grid.offset else ""
            return f"{grid.site} has a grid per {grid.granularity}{level}; integer kernels want one scale"
        if weight is not None and not weight.symmetric:
            return f"{grid.site} has a zero point; integer kernels want symmetric weights"
        if weight is not None and np.abs(2 * weight.codes + 1).max(initial=0) > 255:
            return f"{grid.site} has half-integer levels of {weight.bits} bits, which do not fit in a byte"
        if weight is not None and weight.axis is None:
            return f"{grid.site} has scales along its inputs (per {grid.granularity}), which no kernel sums over"
    if node.op_type == "Einsum":
        return f"there is no integer kernel for the sum {attribute(node, 'equation')}"
    if node.op_type == "ConvTranspose":
        return "there is no integer kernel for transposed convolutions"
    if node.op_type == "Conv" and (right.weight is None or left.weight is not None):
        return "the kernel of the convolution is computed"
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
        return "its bias is computed"
    if node.op_type == "MatMul" and left.weight is not None:
        return "its weight is the first operand"
    if right.weight is not None and right.weight.scale.size > 1:
        last = right.weight.stored.ndim - 1
        if right.weight.axis != (last if node.op_type == "MatMul" else 0):
            return f"{right.grid.site} has scales along its inputs, which no kernel sums over"
    return ""
