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

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from planish.deploy.onnx.codes import Activations
from planish.deploy.onnx.edit import Editor, attribute, constant, only_user
from planish.deploy.onnx.graph import NODE
from planish.deploy.onnx.grids import read_grid
from planish.deploy.onnx.matching import match
from planish.deploy.onnx.operands import KEPT, Operand, obstacle, operand_of, per_head, usable
from planish.deploy.onnx.outputs import is_own
from planish.deploy.onnx.tidy import quantizers
from planish.deploy.onnx.weights import WeightCodes, weight_values

CONSTANT = "computed when the file is written"  # the kernel of a product that no image reaches
PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Einsum")
_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


@dataclass(frozen=True)
class Form:
    """How one product was written: its ``kernel``, and ``why`` where that is no integer kernel.

    ``inexact_channels``: how many output channels may round one code away from the network's own formula.
    ``node``: what its node in the graph is called, where a runtime has yet to choose the kernel.
    """

    name: str
    kernel: str
    why: str = ""
    inexact_channels: int = 0
    node: str = ""


@dataclass
class Lowering:
    """One graph being lowered.

    Attributes:
        exact: convolutions take the fastest kernel only where it rounds as the network's formula does.
        in_float: every quantizer in float arithmetic: what the network computes, for looking inside.
        forms: what became of each product that has a quantized operand.
        weights: by site, the bytes of a quantized weight in the file and in float32.
        has_two_bits: a tensor of two bits is stored, which needs opset 25.
    """

    graph: ir.Graph
    layout: str = "small"
    exact: bool = True
    in_float: bool = False
    forms: list[Form] = field(default_factory=list)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    has_two_bits: bool = False

    def __post_init__(self) -> None:
        self.editor = Editor(self.graph)
        self.activations = Activations(self.editor)
        self.plainly: set[int] = set()

    def run(self) -> None:
        """Replace every ``FakeQuantize`` node."""
        if not self.in_float:
            products = [node for node in self.graph if node.op_type in PRODUCTS]
            for node in reversed(products):
                self._foresee(node)
            for node in products:
                self._product(node)
        self.editor.sweep()
        for node in quantizers(self.graph):  # those that feed no integer product
            grid = read_grid(node)
            integers = not self.in_float and id(node) not in self.plainly and usable(grid)
            if integers and constant(node.inputs[0]) is None:
                self._bytes(node, Operand(node, grid))
            else:
                self._plain(node)
        self.editor.sweep()

    def _bytes(self, node: ir.Node, operand: Operand) -> None:
        """A quantizer as bytes for what is no product; pooled and moved as bytes, too."""
        last, moves = node, []
        while (user := only_user(last.outputs[0])) is not None and user.op_type in KEPT and len(user.outputs) == 1:
            last = user
            moves.append(user)
        values = self.activations.values(last, replace(operand, moves=tuple(moves)), signed=False)
        self.editor.replace(last.outputs[0], values)
        self.editor.remove(last)

    def _foresee(self, node: ir.Node) -> None:
        """Note what stays in float before anything is written: a convolution in front of a quantizer that stays would
        be written for codes that nobody makes."""
        left, right = (operand_of(value) for value in node.inputs[:2])
        if left is None and right is None:
            return
        grouped = node.op_type == "Conv" and attribute(node, "group", 1) != 1
        if obstacle(node, left, right) or (grouped and self._codes_reader(node) is None):
            self._stays(left, right)

    def _codes_reader(self, node: ir.Node) -> ir.Node | None:
        """The quantizer that alone reads a convolution, if a runtime takes both as one: not in three dimensions."""
        reader = only_user(node.outputs[0])
        if (_rank(node.inputs[0]) or 4) > 4:
            return None
        if reader is None or reader.op_type != NODE or id(reader) in self.plainly or not usable(read_grid(reader)):
            return None
        return None if _read_as_signed(reader.outputs[0]) else reader

    def _product(self, node: ir.Node) -> None:
        left, right = (operand_of(value) for value in node.inputs[:2])
        if left is None and right is None:
            return
        name = _named_after(left, right)
        why = obstacle(node, left, right)
        if why or left is None or right is None:
            self._stays(left, right)
            self.forms.append(Form(name, "float", why))
        elif node.op_type == "Conv":
            self.forms.append(self._conv(node, name, left, right))
        elif self._spelled_out(node, right) or per_head(node, left, right):
            self.forms.append(self._matmul_to_integers(node, name, left, right))
        else:
            self.forms.append(self._matmul(node, name, left, right))

    def _stays(self, *operands: Operand | None) -> None:
        """Note a product in float: behind a DequantizeLinear ONNX Runtime would quantize its float weight by itself."""
        self.plainly |= {id(one.node) for one in operands if one is not None}

    # -- matrix products -----------------------------------------------------------------------------------------------

    def _spelled_out(self, node: ir.Node, right: Operand) -> bool:
        """Whether ONNX Runtime would compute the product in float, were it left to choose the kernel.

        Of a weight and two dimensions it makes a Gemm in float first. Where the output goes straight to signed bytes,
        as a key without bias does, it has no kernel, and where it goes straight into a ReLU or a clip it looks for one
        with a quantizer behind that.
        """
        if right.weight is not None and _rank(node.inputs[0]) in (2, None):  # an unknown one may be 2
            return True
        user = only_user(node.outputs[0])
        return _read_as_signed(node.outputs[0]) or (user is not None and user.op_type in ("Relu", "Clip"))

    def _matmul(self, node: ir.Node, name: str, left: Operand, right: Operand) -> Form:
        node.replace_input_with(0, self.activations.values(node, left, signed=False))
        if right.weight is not None:
            node.replace_input_with(1, self._weight(node, right.weight, axis=right.weight.axis or 0))
        else:  # the second operand as signed bytes: products of unsigned with signed ones have the fastest kernels
            node.replace_input_with(1, self.activations.values(node, right, signed=True))
        return Form(name, "MatMulIntegerToFloat", node=node.name or "")

    def _matmul_to_integers(self, node: ir.Node, name: str, left: Operand, right: Operand) -> Form:
        """MatMulInteger, then the scale."""
        codes, zero = self.activations.moved(node, left, signed=False)
        if right.weight is not None:
            others, middle = self._stored(node, right.weight), self.editor.constant(np.array(0, np.int8), "zero")
            scale = _unit(left, right.weight, -1)
        else:
            others, middle = self.activations.moved(node, right, signed=True)
            scale = (left.grid.scale * right.grid.scale.reshape(())).astype(np.float32)
        inputs = [codes, others, zero, middle]
        sums = self.editor.node(node, "MatMulInteger", inputs, name=name, like=node.outputs[0], dtype=ir.DataType.INT32)
        self._scaled(node, name, sums, scale)
        return Form(name, "MatMulInteger")

    # -- convolutions --------------------------------------------------------------------------------------------------

    def _conv(self, node: ir.Node, name: str, left: Operand, right: Operand) -> Form:
        reader, grouped, weight = self._codes_reader(node), attribute(node, "group", 1) != 1, right.weight
        assert weight is not None
        form = None
        if reader is not None:
            exactly = self.exact and not grouped and not is_own(reader)
            form = self._conv_to_codes(node, name, left, weight, reader, exactly)
        if form is None and grouped:
            self._stays(left, right)
            return Form(name, "float", "a grouped convolution whose output is needed in float has no integer kernel")
        return form or self._conv_to_float(node, name, left, weight)

    def _conv_to_codes(
        self, node: ir.Node, name: str, left: Operand, weight: WeightCodes, reader: ir.Node, exactly: bool
    ) -> Form | None:
        """QLinearConv: the output is the codes of the next quantizer. ``None`` if it must be exact and cannot."""
        editor, grid, out = self.editor, left.grid, read_grid(reader)
        factor = weight.factor(grid.qmax - grid.qmin)
        step, zero = float(out.scale.item()), int(out.zero_point.item())
        bias, reach = _bias(node, len(weight.stored)), weight.reach(grid)
        taken = float(grid.scale.item())
        matched = match(_unit(left, weight, 0), bias, step, zero, out.low, out.high, factor, reach, taken)
        if not matched.fit.all() or (exactly and not matched.exact.all()):
            return None
        tuned = weight.with_scale(matched.scale, factor)
        stored = editor.constant(matched.bias.astype(np.int32), f"{name}.bias")
        steps = editor.constant((tuned.scale * grid.scale.reshape(())).astype(np.float32), f"{name}.bias.scale")
        added = editor.node(
            node, "DequantizeLinear", [stored, steps], name=f"{name}.bias", dtype=ir.DataType.FLOAT,
            attributes={"axis": 0},
        )  # fmt: skip
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        values = (self.activations.values(node, left, signed=False), self._weight(node, tuned, axis=0), added)
        for index, value in enumerate(values):
            node.replace_input_with(index, value)
        inexact = int((~matched.exact).sum())
        return Form(name, "QLinearConv", inexact_channels=inexact, node=node.name or "")

    def _conv_to_float(self, node: ir.Node, name: str, left: Operand, weight: WeightCodes) -> Form:
        """ConvInteger, then the scale and the bias in float. Its fastest kernel wants unsigned weights."""
        codes, zero = self.activations.moved(node, left, signed=False)
        middle = self.editor.constant(np.array(128, np.uint8), "middle")
        inputs = [codes, self._stored(node, weight, unsigned=True), zero, middle]
        kept = {key: value.value for key, value in node.attributes.items() if key in _CONV}
        sums = self.editor.node(
            node, "ConvInteger", inputs, name=name, like=node.outputs[0], dtype=ir.DataType.INT32, attributes=kept
        )
        shape = (-1, *[1] * (weight.stored.ndim - 2))
        bias = _bias(node, len(weight.stored)).reshape(shape)
        self._scaled(node, name, sums, _unit(left, weight, 0).reshape(shape), bias if bias.any() else None)
        return Form(name, "ConvInteger")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _scaled(
        self, node: ir.Node, name: str, sums: ir.Value, scale: np.ndarray, bias: np.ndarray | None = None
    ) -> None:
        """Integer sums times their scale, plus a bias, in place of the output of ``node``."""
        editor, out = self.editor, node.outputs[0]
        value = editor.node(node, "Cast", [sums], name=f"{name}.float", like=out, attributes={"to": ir.DataType.FLOAT})
        for op, array, what in (("Mul", scale, "scale"), ("Add", bias, "bias")):
            if array is not None:
                inputs = [value, editor.constant(array, f"{name}.{what}")]
                value = editor.node(node, op, inputs, name=f"{name}.{op.lower()}", like=out)
        editor.replace(out, value)
        editor.remove(node)

    def _weight(self, before: ir.Node, weight: WeightCodes, *, axis: int) -> ir.Value:
        """The values of a weight: its integers and a DequantizeLinear."""
        same = len(np.unique(weight.scale)) == 1
        scale = weight.scale[:1].reshape(()) if same else weight.scale
        return self.editor.node(
            before, "DequantizeLinear",
            [self._stored(before, weight), self.editor.constant(scale, f"{weight.site}.scale")],
            name=f"{weight.site}.dequantize", dtype=ir.DataType.FLOAT, attributes={} if same else {"axis": axis},
        )  # fmt: skip

    def _stored(self, before: ir.Node, weight: WeightCodes, *, unsigned: bool = False) -> ir.Value:
        """A weight's integers as bytes in the graph, stored at their true width with the layout "small"."""
        value, size, narrow = weight_values(self.editor, before, weight, self.layout, unsigned=unsigned)
        self.weights[weight.site] = size, 4 * weight.stored.size
        self.has_two_bits |= narrow and weight.bits == 2
        return value

    def _plain(self, node: ir.Node) -> None:
        """A quantizer in float arithmetic, for any grid: (clip(round(x / s - o), low - z, high - z) + o) s."""
        grid, editor, out = read_grid(node), self.editor, node.outputs[0]
        site, values = grid.site or "quantizer", constant(node.inputs[0])
        if values is not None:
            result = editor.constant(grid.values(values), f"{site}.values")
            self.weights[site] = values.size * 4, values.size * 4
        else:
            low, high, offset = grid.low - grid.zero_point, grid.high - grid.zero_point, np.float32(grid.offset)
            steps: list[tuple[str, Any]] = [("Div", grid.scale), ("Sub", offset), ("Round", None), ("Max", low)]
            result = node.inputs[0]  # type: ignore[assignment]
            for op, array in [*steps, ("Min", high), ("Add", offset), ("Mul", grid.scale)]:
                if array is offset and not grid.offset:
                    continue
                more = [] if array is None else [editor.constant(np.asarray(array, np.float32), f"{site}.{op.lower()}")]
                result = editor.node(node, op, [result, *more], name=f"{site}.{op.lower()}", like=out)
        editor.replace(out, result)
        editor.remove(node)


def _unit(left: Operand, weight: WeightCodes, axis: int) -> np.ndarray:
    """What one step of the integer sum is worth, for each output channel: the product of both scales in float32.

    ``axis``: that of the output channels in the product.
    """
    scale = (left.grid.scale.reshape(()) * weight.scale).astype(np.float32)
    return np.broadcast_to(scale, (weight.stored.shape[axis],)).copy()


def _read_as_signed(value: ir.Value) -> bool:
    """Whether a value becomes the second operand of a matrix product, which takes signed bytes."""
    for user, place in value.uses():
        if user.op_type == "MatMul" and place == 1:
            return True
        if (user.op_type == NODE or user.op_type in KEPT) and _read_as_signed(user.outputs[0]):
            return True
    return False


def _named_after(left: Operand | None, right: Operand | None) -> str:
    """The name of a product, from the sites of its operands.

    Quantizers of the same tensor are one, which has the name of the first, so a weight says it best, and then a site
    that is no layer's input.
    """
    operands = [one for one in (right, left) if one is not None]
    operands.sort(key=lambda one: (one.weight is None, one.grid.site.endswith(".input")))
    return operands[0].product


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _bias(node: ir.Node, channels: int) -> np.ndarray:
    values = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return np.zeros(channels, np.float32) if values is None else np.asarray(values, np.float32)
