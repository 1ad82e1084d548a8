"""The integer reference: a quantized model whose matrix products are computed in integers.

It is what exports are held to: slow, short, and exact about what is an integer and what is float. Every tap gives a
:class:`~planish.deploy.coded.Coded` tensor, which carries its codes to the product that it enters;
:mod:`planish.deploy.arithmetic` says how two such tensors are multiplied, and how near that comes to the
fake-quantized model. Everything else (norms, softmax, GELU, residual sums) is the model's own, in float.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.deploy.arithmetic import IntegerProducts
from planish.deploy.coded import Coded
from planish.errors import PlanishError
from planish.functional import dequantize, quantize
from planish.network import Assignment, Product, taps_of
from planish.network.taps import replace_tap
from planish.quantizers import ShiftedQuantizer, UniformQuantizer


class CodingTap(nn.Module):
    """Quantizes to codes; the values are those of the quantizer that it was made from, bit for bit.

    Args:
        quantizer: on whose grid to round.
        site: its name.
        products: what multiplies the coded tensors.
    """

    def __init__(self, quantizer: UniformQuantizer, site: str, products: IntegerProducts) -> None:
        super().__init__()
        self.quantizer, self.site, self.products = quantizer, site, products

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors do not tell that they were changed
            return self._coded(x)

    def _coded(self, x: Tensor) -> Coded:
        tap, grid, after = self.quantizer, self.quantizer.grid, None
        if isinstance(tap, ShiftedQuantizer):
            x, after = x + tap.before.to(x.dtype), tap.after.to(x.dtype)
        codes = quantize(x, grid)
        values = dequantize(codes, grid).to(x.dtype)
        fields = {
            "codes": codes.to(torch.uint8 if grid.qmin >= 0 else torch.int8),
            "zero_point": grid.zero_point.to(torch.int32).expand(x.shape),
            "scale": grid.scale.expand(x.shape),
            "part": self._part(x),
            "after": None if after is None else after.expand(x.shape),
        }
        return Coded.make(values if after is None else values + after, fields, grid.offset, self)

    def _part(self, x: Tensor) -> Tensor | None:
        """The group of each element: they follow each other in what an output channel holds."""
        fmt, axis = self.quantizer.format, self.quantizer.channel_axis
        if fmt.granularity != "group":
            return None
        front = x.movedim(axis, 0)
        index = torch.arange(front[0].numel(), device=x.device, dtype=torch.int32) // fmt.group_size
        return index.reshape(1, *front.shape[1:]).expand(front.shape).movedim(0, axis)


@dataclass(frozen=True)
class IntegerRow:
    """One product: ``reason`` says why it is in float; ``""``: it runs in integers, with sums of ``depth`` products."""

    product: str
    operator: str
    depth: int
    reason: str


@dataclass(frozen=True)
class IntegerReport:
    """What runs in integers and what does not, in the order of execution; ``print`` it for a table."""

    rows: tuple[IntegerRow, ...]

    @property
    def in_float(self) -> tuple[IntegerRow, ...]:
        return tuple(row for row in self.rows if row.reason)

    def __str__(self) -> str:
        width = max((len(row.product) for row in self.rows), default=0)
        lines = [
            f"{r.product:{width}}  {f'float: {r.reason}' if r.reason else f'int32, depth {r.depth}'}" for r in self.rows
        ]
        done = len(self.rows) - len(self.in_float)
        return "\n".join([*lines, f"{done} of {len(self.rows)} matrix products run in integers"])


def integer_model(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes its matrix products in integers; inputs and outputs stay the same.

    For inference: no gradient passes. A product with an operand in float stays in float; :func:`integer_report` lists
    these.

    Args:
        model: what :func:`planish.quantize` or :func:`planish.train` gave back, or a loaded one.

    Raises:
        PlanishError: the model is not quantized, or a tap of it is no quantizer with a fixed grid. Running the
            result raises one if a sum does not fit in 32 bits.
    """
    plan: Assignment | None = getattr(model, "planish_assignment", None)
    if plan is None:
        raise PlanishError(
            f"the model {type(model).__name__} is not quantized; pass what planish.quantize or planish.train gave back"
        )
    twin, products = copy.deepcopy(model).eval(), IntegerProducts()
    sites = {site.name: site for site, _ in plan.quantized()}
    for name, tap in list(taps_of(twin)):
        if not isinstance(tap, UniformQuantizer):
            raise PlanishError(
                f"{name}: the tap there is a {type(tap).__name__}, expected a quantizer with a fixed grid"
            )
        replace_tap(twin, sites[name], CodingTap(tap, name, products))
    return twin


def integer_report(model: nn.Module) -> IntegerReport:
    """Which products of an :func:`integer_model` run in integers, as its runs until now have shown.

    Raises:
        PlanishError: it is no such model, or has not been run yet.
    """
    taps = [tap for _, tap in taps_of(model) if isinstance(tap, CodingTap)]
    notes = taps[0].products.notes if taps else {}
    if not notes:
        raise PlanishError(
            "there is nothing to report: run what planish.deploy.integers.integer_model gave on an image"
        )
    plan: Assignment = model.planish_assignment  # type: ignore[assignment]
    rows = [_row(product, plan, notes) for product in plan.products]
    rows += [IntegerRow(p.name, p.operator, 0, "no tap reaches it") for p in plan.allowed if not p.sites]
    return IntegerReport(tuple(rows))


def _row(product: Product, plan: Assignment, notes: dict[frozenset[str], tuple[int, str]]) -> IntegerRow:
    sites = [site.name for site in product.sites]
    whole = [name for name in sites if plan.formats[name] is None]
    depth, reason = notes.get(frozenset(sites), (0, ""))
    if whole:
        reason = f"{' and '.join(whole)} stay{'s' if len(whole) == 1 else ''} in float"
    elif frozenset(sites) not in notes:
        seen = {name for key in notes for name in key if key < set(sites)}
        lost = [name for name in sites if name not in seen]
        reason = f"the values of {' and '.join(lost)} were changed on the way from the quantizer to the product"
    return IntegerRow(product.name, product.operator, 0 if reason else depth, reason)
