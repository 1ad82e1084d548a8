"""Matrix products of integer codes: accumulated in 32-bit integers, scaled at the end.

The order is that of ONNX Runtime's MatMulIntegerToFloat::

    acc = sum_i a_i * w_i            exact, must fit in int32; a_i = code - zero point, w_i likewise
    out = float32(acc) * float32(scale_a * scale_w[channel]) + bias

* The half-integer grid ``(q + 1/2) s`` enters as the odd integer ``2 q + 1`` with the scale ``s / 2``, both exact.
* Padding is by the value 0, that is by the step 0 (the code of the zero point).
* A scale for each group of inputs: every group is accumulated and scaled on its own, in the order of the groups, and
  the results are added in float32.
* What a ``ShiftedQuantizer`` adds after its grid is multiplied in float and goes into the bias.

**Overflow.** Steps are at most 255 in magnitude, so a sum of up to 33,025 products cannot leave 32 bits whatever the
formats (65,792 if one operand is symmetric). Longer sums are checked, and refused if one does not fit. Partial sums
may wrap around on the way without harm. The sums are formed in float64, which is exact below 2^53.

**How near the fake-quantized product is.** Write ``u = 2^-24``, ``g(k) = k u / (1 - k u)``, ``S = sum_i |a_i w_i|`` of
the values and ``b`` for the bias. The fake-quantized network rounds both operands to float32 once (code times scale)
and sums ``K`` products and the bias in any order: it is off by at most ``g(K + 3) (S + |b|)`` (Higham 2002, Accuracy
and Stability of Numerical Algorithms, section 3.1). Here the accumulator, the combined scale, their product and the
addition of the bias round once each: ``g(4) (S + |b|)``; G groups are G - 1 additions more, and a shift brings the
error of a product of its own. So for the same operands

    |fake-quantized - integer| <= (g(K + 3) + g(G + 3)) (S + |b|) .

The codes of the next site are equal, unless a value lies within this bound (carried through the float operations in
between) of a tie between two codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.deploy.coded import Coded
from planish.errors import PlanishError
from planish.network.products import Call, ProductMode

INT32 = 2**31 - 1
_BIASED = ("addmm", "baddbmm", "addbmm")  # beta * input + alpha * product


def rounding_bound(depth: int, groups: int = 1) -> float:
    """The factor of ``S + |b|`` in the bound above, for sums of ``depth`` products."""
    u = 2.0**-24
    return sum(k * u / (1 - k * u) for k in (depth + 3, groups + 3))


@dataclass(frozen=True)
class _Layout:
    """Which axes of the two operands are summed over, and how long the sum is."""

    summed: tuple[tuple[int, ...], tuple[int, ...]]
    depth: int


def _layout(call: Call) -> _Layout | str:
    """How the operands of a call lie; a string says why that is not known."""
    operator, (left, right) = call.signature.operator, call.operands.values()
    rest = tuple(range(1, right.dim()))
    if operator == "linear":
        return _Layout(((left.dim() - 1,), rest), right.shape[-1])
    if operator.startswith("conv"):
        channel = 1 if call.signature.transposed else 0
        batched = left.dim() == right.dim()
        axes = tuple(axis for axis in range(right.dim()) if axis != channel)
        return _Layout((tuple(range(batched, left.dim())), axes), right.numel() // right.shape[channel])
    if operator == "einsum":
        return _einsum_layout(call.arguments[0][0], left, right)
    batch = (0,) if operator == "addbmm" else ()
    axis = max(0, right.dim() - 2)
    return _Layout(((*batch, left.dim() - 1), (*batch, axis)), left.shape[-1] * (left.shape[0] if batch else 1))


def _einsum_layout(equation: str, left: Tensor, right: Tensor) -> _Layout | str:
    terms, _, out = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    if "..." in terms:
        return "an einsum with an ellipsis is not spelled out"
    kept = out if "->" in equation else {c for c in terms if terms.count(c) == 1}
    sizes = {
        label: n for term, t in zip(labels, (left, right), strict=True) for label, n in zip(term, t.shape, strict=True)
    }
    summed = tuple(tuple(i for i, label in enumerate(term) if label not in kept) for term in labels)
    return _Layout((summed[0], summed[1]), math.prod(n for label, n in sizes.items() if label not in kept))


class IntegerProducts(ProductMode):
    """Computes the products of coded operands in integers, and keeps a note of each.

    Attributes:
        notes: by the sites of the operands: depth of the sum, and why the product was computed in float (or ``""``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[frozenset[str], tuple[int, str]] = {}

    def product(self, call: Call) -> Any:
        sites = frozenset(t.tap.site for t in call.operands.values() if isinstance(t, Coded))
        depth, reason = 0, _obstacle(call)
        if not reason:
            layout = _layout(call)
            if isinstance(layout, str):
                reason = layout
            else:
                depth, reason = layout.depth, _varies(call, layout)
        if sites not in self.notes or reason:
            self.notes[sites] = depth, reason
        if reason:
            return call.compute({n: t.plain if isinstance(t, Coded) else t for n, t in call.operands.items()})
        assert isinstance(layout, _Layout)
        return integer_product(call, layout)


def _obstacle(call: Call) -> str:
    """Why the operands cannot be multiplied as integers, or nothing."""
    if len(call.operands) != 2:
        return f"it has {len(call.operands)} operands"
    coded = [isinstance(tensor, Coded) and tensor.codes is not None for tensor in call.operands.values()]
    return "" if all(coded) else "an operand of it is in float"


def _varies(call: Call, layout: _Layout) -> str:
    for tensor, summed in zip(call.operands.values(), layout.summed, strict=True):
        assert isinstance(tensor, Coded)
        if tensor.part is None and not _constant(tensor.scale, summed):
            return f"the scales of {tensor.tap.site} differ along the sum"
    return ""


def _constant(tensor: Tensor, axes: tuple[int, ...]) -> bool:
    first = tensor
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return all(tensor.stride(a) == 0 or tensor.shape[a] == 1 for a in axes) or bool((tensor == first).all())


def integer_product(call: Call, layout: _Layout) -> Tensor:
    """The product of two coded operands; see the module."""
    left, right = call.operands.values()
    assert isinstance(left, Coded)
    assert isinstance(right, Coded)
    dtype = torch.promote_types(left.dtype, torch.float32)
    names = list(call.operands)
    steps, out = [left.steps.double(), right.steps.double()], None
    for i, j in _parts(left, right):
        chosen = [
            s if t.part is None else s * (t.part == k) for s, t, k in zip(steps, (left, right), (i, j), strict=True)
        ]
        acc = _multiply(call, dict(zip(names, chosen, strict=True))).round_()
        if acc.numel() and float(acc.abs().amax()) > INT32:
            raise PlanishError(
                f"{left.tap.site}: a sum over {layout.depth:,} products of its codes does not fit in 32 bits; give the "
                f"product fewer bits (a scheme's overrides), or leave it in float (allow=)"
            )
        units = [_narrowed(t, axes, k) for t, axes, k in zip((left, right), layout.summed, (i, j), strict=True)]
        scaled = acc.to(torch.int32).to(dtype) * _combined(call, units, acc).to(dtype)
        out = scaled if out is None else out + scaled
    assert out is not None
    return _finish(call, out, left, right).to(left.dtype)


def _parts(left: Coded, right: Coded) -> list[tuple[int, int]]:
    """The pairs of groups whose products share a scale."""
    counts = [1 if t.part is None else int(t.part.max()) + 1 for t in (left, right)]
    return [(i, j) for i in range(counts[0]) for j in range(counts[1])]


def _multiply(call: Call, tensors: dict[str, Tensor]) -> Tensor:
    """The bare product, without bias, of what stands in for the operands."""
    if call.signature.weighted:
        return call.compute({**tensors, "bias": None})
    if call.signature.operator == "einsum":
        return call.compute(tensors)
    out = torch.matmul(*tensors.values())
    return out.sum(0) if call.signature.operator == "addbmm" else out


def _narrowed(tensor: Coded, summed: tuple[int, ...], part: int) -> Tensor:
    """The scales of a group in float64, of length 1 along the axes that are summed over or that share a scale."""
    unit = tensor.unit
    if tensor.part is not None:
        return torch.where(tensor.part == part, unit, 0).amax(summed, keepdim=True).double()
    for axis in range(unit.dim()):
        if axis in summed or unit.stride(axis) == 0:
            unit = unit.narrow(axis, 0, 1)
    return unit.double()


def _combined(call: Call, units: list[Tensor], acc: Tensor) -> Tensor:
    """scale_a * scale_w, rounded to float32 once (a product of two float32 is exact in float64)."""
    if not call.signature.operator.startswith("conv"):
        return _multiply(call, dict(zip(call.operands, units, strict=True))).float()
    activation, weight = units
    channels = weight.flatten()
    if call.signature.transposed:  # every group of inputs has the same output channels in its weight
        channel = acc.dim() - weight.dim() + 1
        channels = channels if len(channels) == 1 else channels.repeat(acc.shape[channel] // len(channels))
    return (activation * channels.reshape(-1, *[1] * (weight.dim() - 2))).float()


def _finish(call: Call, out: Tensor, left: Coded, right: Coded) -> Tensor:
    """Adds what is in float: the bias, and the products of what was added after the grids."""
    shifts = _shifts(call, left, right)
    operator, (positional, named) = call.signature.operator, call.arguments
    if operator in _BIASED:
        added = positional[0] if positional else named["input"]
        shifts = out if shifts is None else out + shifts
        return named.get("beta", 1) * added + named.get("alpha", 1) * shifts
    if call.signature.weighted:
        bias = positional[2] if len(positional) > 2 else named.get("bias")
        if bias is not None:
            spatial = 0 if operator == "linear" else call.operands["weight"].dim() - 2
            bias = bias.reshape(-1, *[1] * spatial)
            shifts = bias if shifts is None else bias + shifts
    return out if shifts is None else out + shifts


def _shifts(call: Call, left: Coded, right: Coded) -> Tensor | None:
    """(a + s)(b + t) - a b = s (b + t) + a t, in float."""
    names, found = list(call.operands), None
    if left.after is not None:
        found = _multiply(call, dict(zip(names, (left.after, right.plain), strict=True)))
    if right.after is not None:
        rest = left.plain if left.after is None else left.plain - left.after
        other = _multiply(call, dict(zip(names, (rest, right.after), strict=True)))
        found = other if found is None else found + other
    return found
