"""What of a model goes into a checkpoint: codes, grids, everything else, and the plan."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.deploy.packed.agreement import check_grid, check_values, shrink, tap_prefix
from planish.deploy.packed.architecture import named_tensors
from planish.deploy.packed.container import NAMES, Entry
from planish.deploy.packed.head import Constant, Head, Packed
from planish.deploy.packed.packing import pack
from planish.deploy.packed.values import shown
from planish.errors import PlanishError
from planish.functional import dequantize, quantize
from planish.models import Preprocessing
from planish.network import Assignment, Site, taps_of
from planish.network.coverage import read_through_its_tap
from planish.network.rebuilding import rebuilt
from planish.quantizers import ShiftedQuantizer, UniformQuantizer
from planish.scheme import Format

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to compare values bit for bit


@dataclass(frozen=True)
class Content:
    """The tensors of a file, and its head without a recipe."""

    name: str
    head: Head
    tensors: dict[str, Tensor]

    @property
    def entries(self) -> dict[str, Entry]:
        """The table of the file, but for the places."""
        return {key: Entry(t.dtype, tuple(t.shape), 0, t.numel() * t.element_size()) for key, t in self.tensors.items()}


@torch.no_grad()
def content_of(model: nn.Module) -> Content:
    """Everything that must be known of a model to have it again, but for its architecture.

    Raises:
        PlanishError: a tap is no finished quantizer, or a tensor cannot be stored exactly.
    """
    kind = getattr(type(model), "_planish_class", type(model)).__name__
    plan: Assignment | None = getattr(model, "planish_assignment", None)
    taps: dict[str, Any] = dict(taps_of(model))
    if plan is None and taps:
        raise PlanishError(f"this {kind} has taps and no plan: save what planish.quantize or planish.train gave back")
    sites = {site.name: (site, fmt) for site, fmt in plan.quantized()} if plan else {}
    for name in {**sites, **taps}:
        tap: Any = taps.get(name)
        if type(tap) not in (UniformQuantizer, ShiftedQuantizer) or not tap.fitted or name not in sites:
            raise PlanishError(f"{name}: {type(tap).__name__} is no finished quantizer, so the model cannot be saved")
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise PlanishError(f"{path}: a {type(module).__name__} keeps extra state, which a checkpoint cannot hold")
    tensors, tied = _own_tensors(model, sites)
    packed = {}
    for name, (site, fmt) in sites.items():
        own = {key: getattr(taps[name], key) for key in ("scale", "zero_point")}
        if isinstance(taps[name], ShiftedQuantizer):
            own |= {key: getattr(taps[name], key) for key in ("before", "after")}
        own = {key: value.detach().cpu() for key, value in own.items()}
        check_grid(site, fmt, own)
        if plan and name in tensors and read_through_its_tap(model, site, plan):
            weight = tensors[name]
            packed[name] = Packed(name, weight.dtype, tuple(weight.shape))
            tensors[name] = _codes(weight, site, fmt, taps[name])
        tensors |= {tap_prefix(site) + key: shrink(value, site, fmt) for key, value in own.items()}
    constant = _constants({key: tensor for key, tensor in tensors.items() if key not in packed}, tensors)
    head = Head({}, Preprocessing(), None, {}, rebuilt(model), plan, packed, constant, tied)
    return Content(kind, head, {key: tensor for key, tensor in tensors.items() if key not in constant})


def _own_tensors(model: nn.Module, sites: dict[str, tuple[Site, Format]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers on the CPU, each once, and by their other names those that have several."""
    names: dict[int, list[str]] = defaultdict(list)
    tensors = {}
    for key, tensor, is_parameter in named_tensors(model):
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise PlanishError(f"{key} is a {tensor.layout} tensor of {tensor.dtype}, which a checkpoint cannot hold")
        tensors[key] = check_values(key, tensor.detach().cpu())
        if is_parameter:
            names[id(tensor)].append(key)
    tied: dict[str, str] = {}
    for keys in names.values():
        first = next((key for key in keys if key in sites), keys[0])
        tied |= {key: first for key in keys if key != first}
    return {key: tensor for key, tensor in tensors.items() if key not in tied}, tied


def _codes(weight: Tensor, site: Site, fmt: Format, tap: UniformQuantizer) -> Tensor:
    """The bytes of a weight's codes, once it is sure that their values have the same codes again."""
    grid = tap.grid._replace(scale=tap.scale.cpu(), zero_point=tap.zero_point.cpu())
    codes = quantize(weight, grid)
    again = quantize(dequantize(codes, grid).to(weight.dtype), grid)
    if not torch.equal(codes, again):
        raise PlanishError(
            f"{shown(site.name)}: {fmt.bits} bits at its scales cannot be told apart in {weight.dtype}, so the weight "
            f"cannot be stored: save the model in float32"
        )
    return pack(codes - fmt.qmin, fmt.bits)


def _constants(among: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Constant]:
    """Tensors that hold one value only, as long as all of them together are smaller than the rest."""
    found = {}
    for key, tensor in sorted(among.items(), key=lambda item: item[1].numel()):
        bits = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
        if len(bits) >= 8 and bool((bits == bits[0]).all()) and math.isfinite(tensor.reshape(-1)[0].item()):
            found[key] = Constant(tensor.dtype, tuple(tensor.shape), tensor.reshape(-1)[0].item())
    size = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    spent, rest, kept = 0, sum(size.values()), {}
    for key, constant in found.items():
        spent, rest = spent + size[key], rest - size[key]
        if spent > rest:
            break
        kept[key] = constant
    return kept
