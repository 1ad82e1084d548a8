"""From ``FakeQuantize`` nodes to what stock runtimes execute on integers, without changing what is computed.

Activations become QuantizeLinear (eight bits) -> Clip (to the codes of b bits) -> DequantizeLinear, weights integers of
their true width -> Cast -> DequantizeLinear. Runtimes fuse these with the product between them. Three forms of a
product come out:

* a matrix product keeps its float output: ONNX Runtime makes MatMulIntegerToFloat of it;
* a convolution whose output goes straight to one quantizer becomes QLinearConv; its bias and its multiplier are matched
  so that it rounds as the float formula does (``matching.py``);
* any other convolution is spelled out as ConvInteger, a multiplication and a sum. QLinearConv cannot give floats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.edit import Editor, attribute, constant, only_user
from planish.deploy.graph import NODE
from planish.deploy.grids import NodeGrid, read_grid
from planish.deploy.matching import match
from planish.deploy.outputs import is_own
from planish.deploy.tidy import MOVES, quantizers
from planish.deploy.weights import WeightCodes, weight_values

LAYOUTS = ("small", "fast")
PRODUCTS = ("Conv", "ConvTranspose", "MatMul")


@dataclass
class Form:
    """How one product was written: ``kernel`` as planned, ``why`` where it is not an integer one, and whether the
    rounding of its output is exact."""

    name: str
    kernel: str
    why: str = ""
    inexact_channels: int = 0


@dataclass
class Lowering:
    """One graph being lowered; ``forms`` says what became of each product, ``weights`` of each weight."""

    graph: ir.Graph
    layout: str = "small"
    in_float: bool = False  # every quantizer in float arithmetic: what the network computes, for looking inside
    forms: list[Form] = field(default_factory=list)
    weights: dict[str, int] = field(default_factory=dict)  # bytes in the file, by site

    def __post_init__(self) -> None:
        self.editor = Editor(self.graph)

    def run(self) -> None:
        """Replace every ``FakeQuantize`` node."""
        if not self.in_float:
            for node in [node for node in self.graph if node.op_type in PRODUCTS]:
                self._product(node)
        for node in quantizers(self.graph):  # those that feed no integer product
            if not self.in_float and _usable(read_grid(node)) and constant(node.inputs[0]) is None:
                self.editor.replace(node.outputs[0], self._activation(node, _Operand(node, read_grid(node)), signed=False))
                self.editor.remove(node)
            else:
                self._plain(node)
        self.editor.sweep()

    def _product(self, node: ir.Node) -> None:
        operands = [_operand(value) for value in node.inputs[:2]]
        if not any(operands):
            return
        name = next((o.site_owner for o in reversed(operands) if o is not None), node.name or node.op_type)
        why = _obstacle(node, operands)
        if why:
            self.forms.append(Form(name, "float", why))
            return
        left, right = operands
        assert left is not None and right is not None
        if node.op_type == "MatMul":
            self._matmul(node, name, left, right)
        else:
            self._conv(node, name, left, right)

    # -- matrix products --------------------------------------------------------------------------------------------

    def _matmul(self, node: ir.Node, name: str, left: _Operand, right: _Operand) -> None:
        if right.weight is not None and _rank(node.inputs[0]) == 2:
            return self._matmul_spelled_out(node, name, left, right)
        for index, operand in enumerate((left, right)):
            if operand.weight is not None:
                value = self._weight(node, operand, axis=operand.weight.axis or 0)
            else:
                # the second operand as signed bytes: products of unsigned and signed ones have the fastest kernels
                value = self._activation(node, operand, signed=index == 1)
            node.replace_input_with(index, value)
        self.forms.append(Form(name, "MatMulIntegerToFloat"))

    def _matmul_spelled_out(self, node: ir.Node, name: str, left: _Operand, right: _Operand) -> None:
        """MatMulInteger, then the scale: of a product of two dimensions ONNX Runtime makes a Gemm in float first."""
        weight, out = right.weight, node.outputs[0]
        assert weight is not None
        codes, zero = self._moved_codes(node, left, signed=False)
        stored, middle = self._packed(node, weight, unsigned=False)
        sums = self.editor.node(node, "MatMulInteger", [codes, stored, zero, middle], name=name, like=out, dtype=ir.DataType.INT32)  # fmt: skip
        scale = (left.grid.scale.reshape(()) * weight.scale).astype(np.float32).reshape(-1)
        self._scaled(node, name, sums, scale)
        self.forms.append(Form(name, "MatMulInteger"))

    def _scaled(self, node: ir.Node, name: str, sums: ir.Value, scale: np.ndarray, bias: np.ndarray | None = None) -> None:
        """Integer sums times their scale, plus a bias, in place of the output of ``node``."""
        editor, out = self.editor, node.outputs[0]
        value = editor.node(node, "Cast", [sums], name=f"{name}.float", like=out, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)  # fmt: skip
        value = editor.node(node, "Mul", [value, editor.constant(scale, f"{name}.scale")], name=f"{name}.scaled", like=out)
        if bias is not None:
            value = editor.node(node, "Add", [value, editor.constant(bias, f"{name}.bias")], name=f"{name}.biased", like=out)
        editor.replace(out, value)
        editor.remove(node)

    # -- convolutions -----------------------------------------------------------------------------------------------

    def _conv(self, node: ir.Node, name: str, left: _Operand, right: _Operand) -> None:
        reader = _one_quantizer(node.outputs[0])
        if reader is not None and not _usable(read_grid(reader)):
            reader = None
        if reader is not None:
            self._conv_to_codes(node, name, left, right, reader)
        elif attribute(node, "group", 1) == 1:
            self._conv_to_float(node, name, left, right)
        else:
            self.forms.append(
                Form(name, "float", "a grouped convolution whose output is needed in float: no runtime kernel is faster")
            )

    def _conv_to_codes(self, node: ir.Node, name: str, left: _Operand, right: _Operand, reader: ir.Node) -> None:
        """QLinearConv: the output is the codes of the next quantizer."""
        weight = right.weight
        assert weight is not None
        grid, out = left.grid, read_grid(reader)
        channels = len(weight.codes)
        bias = _bias(node, channels)
        factor = weight.factor(grid.high - grid.low if not grid.signed else grid.qmax - grid.qmin)
        scale = (grid.scale.reshape(()) * weight.scale).astype(np.float32)
        step, zero = float(out.scale.reshape(())), int(out.zero_point.reshape(()))
        # what the kernel adds and multiplies with
        matched = match(scale, bias, step, zero, out.low, out.high, factor, weight.reach(grid))
        if not matched.exact.all() and not is_own(reader) and attribute(node, "group", 1) == 1:
            return self._conv_to_float(node, name, left, right)
        unit = (matched.multiplier * step).astype(np.float32)  # one step of the kernel's sum
        tuned = weight.with_scale((unit / grid.scale.reshape(())).astype(np.float32), factor)
        node.replace_input_with(0, self._activation(node, left, signed=False))
        node.replace_input_with(1, self._weight(node, right, axis=0, codes=tuned))
        editor = self.editor
        stored = editor.constant(matched.bias.astype(np.int32), f"{name}.bias")
        steps = editor.constant((tuned.scale * grid.scale.reshape(())).astype(np.float32), f"{name}.bias.scale")
        value = editor.node(node, "DequantizeLinear", [stored, steps], name=f"{name}.bias", dtype=ir.DataType.FLOAT, axis=0)
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)
        self.forms.append(Form(name, "QLinearConv", inexact_channels=int((~matched.exact).sum())))

    def _conv_to_float(self, node: ir.Node, name: str, left: _Operand, right: _Operand) -> None:
        """ConvInteger, then the scale and the bias in float."""
        weight = right.weight
        assert weight is not None
        codes, zero = self._moved_codes(node, left, signed=False)
        stored, middle = self._packed(node, weight, unsigned=True)
        kinds = {"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}
        kept = {key: value.value for key, value in node.attributes.items() if key in kinds}
        sums = self.editor.node(
            node, "ConvInteger", [codes, stored, zero, middle], name=name, like=node.outputs[0], dtype=ir.DataType.INT32, **kept
        )  # fmt: skip
        shape = (-1, *[1] * (weight.codes.ndim - 2))
        scale = (left.grid.scale.reshape(()) * weight.scale).astype(np.float32).reshape(shape)
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        self._scaled(node, name, sums, scale, _bias(node, len(weight.codes)).reshape(shape) if has_bias else None)
        self.forms.append(Form(name, "ConvInteger"))

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _codes(self, before: ir.Node, operand: _Operand, *, signed: bool) -> tuple[ir.Value, ir.Value]:
        """The eight-bit codes of an activation, and its zero point. Written once for each quantizer and sign."""
        node, grid = operand.node, operand.grid
        key = "codes.signed" if signed else "codes"
        if key not in node.meta:
            editor, site = self.editor, grid.site or node.name or "activation"
            # unsigned: [0, 255] holds signed codes shifted up; signed: eight-bit unsigned codes shifted down
            shift = (-grid.qmin if grid.signed else 0) if not signed else (-128 if grid.qmax > 127 else 0)
            kind, dtype = (np.int8, ir.DataType.INT8) if signed else (np.uint8, ir.DataType.UINT8)
            scale = editor.constant(grid.scale.reshape(()), f"{site}.scale")
            zero = editor.constant(np.array(grid.zero_point.reshape(()) + shift).astype(kind), f"{site}.zero_point")
            value = editor.node(node, "QuantizeLinear", [node.inputs[0], scale, zero], name=f"{site}.quantize", like=node.outputs[0], dtype=dtype)  # fmt: skip
            low, high = grid.low + shift, grid.high + shift
            info = np.iinfo(kind)
            if (low, high) != (info.min, info.max):
                ends = [editor.constant(np.array(end, dtype=kind), f"{site}.{n}") for end, n in ((low, "low"), (high, "high"))]
                value = editor.node(node, "Clip", [value, *ends], name=f"{site}.clip", like=node.outputs[0], dtype=dtype)
            node.meta[key] = (value, zero, scale)
        value, zero, _ = node.meta[key]
        return value, zero

    def _moved_codes(self, before: ir.Node, operand: _Operand, *, signed: bool) -> tuple[ir.Value, ir.Value]:
        """The codes as the product takes them: bytes are transposed and reshaped, not floats."""
        codes, zero = self._codes(before, operand, signed=signed)
        for move in operand.moves:
            kept = {key: value.value for key, value in move.attributes.items()}
            codes = self.editor.node(
                before, move.op_type, [codes, *move.inputs[1:]], name=f"{operand.grid.site}.{move.op_type}",
                like=move.outputs[0], dtype=codes.dtype, **kept,
            )  # fmt: skip
        return codes, zero

    def _activation(self, before: ir.Node, operand: _Operand, *, signed: bool) -> ir.Value:
        codes, zero = self._moved_codes(before, operand, signed=signed)
        scale = operand.node.meta["codes.signed" if signed else "codes"][2]
        like = (operand.moves[-1] if operand.moves else operand.node).outputs[0]
        name = f"{operand.grid.site or 'activation'}.dequantize"
        return self.editor.node(before, "DequantizeLinear", [codes, scale, zero], name=name, like=like)

    def _weight(self, before: ir.Node, operand: _Operand, *, axis: int, codes: WeightCodes | None = None) -> ir.Value:
        weight = codes or operand.weight
        assert weight is not None
        stored, zero = self._packed(before, weight, unsigned=False)
        per_tensor = weight.scale.size == 1 or len(set(weight.scale.tolist())) == 1
        scale = weight.scale.reshape(-1)[:1].reshape(()) if per_tensor else weight.scale.reshape(-1)
        inputs = [stored, self.editor.constant(scale, f"{weight.site}.scale")]
        return self.editor.node(
            before, "DequantizeLinear", inputs, name=f"{weight.site}.dequantize", dtype=ir.DataType.FLOAT,
            **({} if per_tensor else {"axis": axis}),
        )  # fmt: skip

    def _packed(self, before: ir.Node, weight: WeightCodes, *, unsigned: bool) -> tuple[ir.Value, ir.Value]:
        """The weight's integers as eight-bit values in the graph, stored at their true width with the layout "small"."""
        editor = self.editor
        value, stored = weight_values(editor, before, weight, self.layout, unsigned=unsigned)
        self.weights[weight.site] = stored
        zero = np.array(128, np.uint8) if unsigned else np.array(0, np.int8)
        return value, editor.constant(zero, "middle" if unsigned else "zero")

    def _plain(self, node: ir.Node) -> None:
        """A quantizer in float arithmetic, for any grid: ((clip(round(x / s - o) + z)) - z + o) s."""
        grid, editor, site = read_grid(node), self.editor, read_grid(node).site or "quantizer"
        out, (x, *_) = node.outputs[0], node.inputs
        values = constant(x)
        if values is not None:
            codes = grid.codes(values)
            floats = ((codes - grid.zero_point + np.float32(grid.offset)) * grid.scale).astype(np.float32)
            result = editor.constant(floats, f"{site}.values")
            self.weights[site] = floats.nbytes
        else:
            def step(op: str, value: Any, *others: Any, name: str) -> ir.Value:
                constants = [editor.constant(np.asarray(o, dtype=np.float32), f"{site}.{name}.{i}") for i, o in enumerate(others)]
                return editor.node(node, op, [value, *constants], name=f"{site}.{name}", like=out)

            result = step("Div", x, grid.scale, name="steps")
            if grid.offset:
                result = step("Sub", result, grid.offset, name="levels")
            result = step("Round", result, name="codes")
            low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
            result = step("Min", step("Max", result, low, name="low"), high, name="high")
            if grid.offset:
                result = step("Add", result, grid.offset, name="middle")
            result = step("Mul", result, grid.scale, name="values")
        editor.replace(out, result)
        editor.remove(node)


@dataclass
class _Operand:
    """An operand of a product that comes out of a quantizer."""

    node: ir.Node
    grid: NodeGrid
    weight: WeightCodes | None = None
    moves: tuple[ir.Node, ...] = ()  # between the quantizer of an activation and the product, first one first

    @property
    def site_owner(self) -> str:
        return self.grid.site.rpartition(".")[0] or self.grid.site


def _operand(value: ir.Value | None) -> _Operand | None:
    moves: list[ir.Node] = []
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in MOVES:
        moves.insert(0, producer)
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    if producer is None or producer.op_type != NODE:
        return None
    grid = read_grid(producer)
    values = constant(producer.inputs[0])
    if values is None:
        return _Operand(producer, grid, None, tuple(moves))
    if len(moves) > 1 or any(move.op_type != "Transpose" for move in moves):
        return None
    permutation = attribute(moves[0], "perm") if moves else None
    return _Operand(producer, grid, WeightCodes.of(values, grid, permutation))


def _usable(grid: NodeGrid) -> bool:
    """Whether an activation's grid is one that integer kernels take."""
    inside = 0 <= float(grid.zero_point.reshape(-1)[0]) - grid.qmin <= 255
    return grid.per_tensor and grid.qmax - grid.qmin <= 255 and inside


def _obstacle(node: ir.Node, operands: list[_Operand | None]) -> str:
    """Why a product cannot run on integers; empty if it can."""
    left, right = operands
    if left is None or right is None:
        return f"its {'first' if left is None else 'second'} operand is not quantized"
    for operand in (left, right):
        grid, weight = operand.grid, operand.weight
        if weight is not None:
            if not weight.symmetric:
                return f"{grid.site} has a zero point; integer kernels want symmetric weights"
            if weight.axis is None:
                return f"{grid.site} has scales along its inputs (per {grid.granularity}), which no kernel sums over"
        elif not _usable(grid):
            return f"{grid.site} has a grid per {grid.granularity}{' without a zero level' if grid.offset else ''}"
    if node.op_type == "ConvTranspose":
        return "there is no integer kernel for transposed convolutions"
    if node.op_type == "Conv" and right.weight is None:
        return "the kernel of the convolution is computed"
    if node.op_type == "MatMul" and left.weight is not None:
        return "its weight is the first operand"
    return ""


def _one_quantizer(value: ir.Value) -> ir.Node | None:
    user = only_user(value)
    return user if user is not None and user.op_type == NODE else None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _bias(node: ir.Node, channels: int) -> np.ndarray:
    values = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return np.zeros(channels, np.float32) if values is None else np.asarray(values, np.float32)
