"""Do the tensors of a checkpoint, its metadata and the architecture agree? Asked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from planish.deploy.packed.architecture import Layout, Shape
from planish.deploy.packed.container import Entry
from planish.deploy.packed.head import Head, Packed
from planish.deploy.packed.packing import packed_size
from planish.deploy.packed.values import shown
from planish.errors import PlanishError
from planish.network import Site
from planish.network.taps import CHILD
from planish.scheme import Format

BUFFERS = ("scale", "zero_point", "before", "after")  # of taps; the last two only where a grid is shifted


def tap_prefix(site: Site) -> str:
    """How the names of the tensors of a site's tap begin."""
    return ".".join(part for part in (site.owner, CHILD, site.slot) if part) + "."


def check_agreement(head: Head, entries: Mapping[str, Entry], layout: Layout) -> None:
    """Every tensor of the file has its place in the architecture, every place has its tensor, shapes and sizes agree.

    Raises:
        PlanishError: something does not.
    """
    _check_constants(head, entries)
    sites = {site.name: (site, fmt) for site, fmt in head.assignment.quantized()} if head.assignment else {}
    shapes: dict[str, Shape] = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
    shapes |= {key: (constant.dtype, constant.shape) for key, constant in head.constant.items()}
    for key, packed in head.packed.items():
        _check_packed(key, packed, shapes.get(key), sites)
        shapes[key] = (packed.dtype, packed.shape)
    for name, first in head.tied.items():
        tied = {name, first} <= layout.parameters and layout.tensors[name] == layout.tensors[first]
        if name in shapes or first not in shapes or not tied:
            raise PlanishError(f"{shown(name)} is tied to {shown(first)}, which does not fit its architecture")
        shapes[name] = shapes[first]
    taps = {key: shapes.pop(key) for key in list(shapes) if CHILD in key.split(".")}
    _check_weights(shapes, layout)
    _check_places(head, layout)
    for site, fmt in sites.values():
        _check_tap(site, fmt, taps)
    if taps:
        raise PlanishError(f"{shown(min(taps))} belongs to no site that is quantized")


def _check_constants(head: Head, entries: Mapping[str, Entry]) -> None:
    stored = sum(entry.end - entry.begin for entry in entries.values())
    constants = sum(c.dtype.itemsize * math.prod(c.shape) for c in head.constant.values())
    if constants > stored:
        raise PlanishError(f"its constants would take {constants} bytes, more than all of its tensors ({stored})")
    if both := head.constant.keys() & entries.keys():
        raise PlanishError(f"{shown(min(both))} is a constant and a tensor")


def _check_packed(key: str, packed: Packed, stored: Shape | None, sites: Mapping[str, tuple[Site, Format]]) -> None:
    site, fmt = sites.get(packed.site, (None, None))
    if site is None or fmt is None or not site.parameter or key != site.name:
        raise PlanishError(f"{shown(key)} is packed by the grid of {shown(packed.site)}, which is not that of a weight")
    if packed.shape != site.shape or not packed.dtype.is_floating_point:
        raise PlanishError(f"{shown(key)} is packed with another shape or type than that of its site")
    size = packed_size(math.prod(packed.shape), fmt.bits)
    if stored != (torch.uint8, (size,)):
        raise PlanishError(
            f"{shown(key)} has {math.prod(packed.shape)} codes of {fmt.bits} bits, expected {size} bytes"
        )


def _check_weights(shapes: Mapping[str, Shape], layout: Layout) -> None:
    if missing := layout.tensors.keys() - shapes.keys():
        raise PlanishError(
            f"does not fit the architecture it names: {shown(min(missing))} is missing ({len(missing)} tensors)"
        )
    for key, (dtype, shape) in shapes.items():
        if key in layout.tensors:
            own_dtype, own_shape = layout.tensors[key]
            fits = shape == own_shape and (
                dtype == own_dtype or (dtype.is_floating_point and own_dtype.is_floating_point)
            )
        else:
            fits = shape == (layout.biases.get(key),) and dtype.is_floating_point
        if not fits:
            what = f"has {list(shape)} values" if key in layout.tensors else "is not in it"
            raise PlanishError(f"does not fit the architecture it names: {shown(key)} {what}")


def _check_places(head: Head, layout: Layout) -> None:
    """Every module that the ledger names is there, and every weight has the shape that the ledger gives."""
    for product in head.assignment.products if head.assignment else ():
        for path in (product.module, *(site.owner for site in product.sites)):
            if path not in layout.modules:
                raise PlanishError(f"does not fit the architecture it names: it has no module {shown(path)}")
        for site in product.sites:
            known = layout.tensors.get(site.name, (None, None))[1]
            if site.parameter and (known != site.shape or site.name not in layout.parameters):
                raise PlanishError(f"does not fit the architecture it names: {shown(site.name)} is no such weight")
            if not site.parameter and (not site.slot.isidentifier() or hasattr(torch.nn.Module, site.slot)):
                raise PlanishError(f"its ledger names the site {shown(site.name)}, which no tap can have")


def _check_tap(site: Site, fmt: Format, taps: dict[str, Shape]) -> None:
    prefix = tap_prefix(site)
    own = {name: taps.pop(prefix + name) for name in BUFFERS if prefix + name in taps}
    if set(own) not in ({"scale", "zero_point"}, set(BUFFERS)):
        raise PlanishError(f"the site {shown(site.name)} has no scale and zero point")
    for name, (dtype, shape) in own.items():
        grouped = name in BUFFERS[:2] and fmt.granularity == "group" and site.parameter
        fits = broadcasts(shape, site.shape) or (grouped and shape == groups(site, fmt))
        if dtype != torch.float32 or not fits:
            raise PlanishError(f"the {name} of {shown(site.name)} has the shape {list(shape)}, which does not fit it")


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be spread over another without changing the other's shape."""
    aligned = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(shape, aligned, strict=True))


def groups(site: Site, fmt: Format) -> tuple[int, ...]:
    """The shape of scales by groups as they are stored: one for each group, channel after channel."""
    count = math.prod(site.shape)
    return (count // fmt.group_size,) if count % fmt.group_size == 0 else ()


def shrink(scale: Tensor, site: Site, fmt: Format) -> Tensor:
    """Scales by groups, which lie in the shape of the weight, one for each group; others as they are."""
    if fmt.granularity != "group" or not site.parameter or tuple(scale.shape) != site.shape or not groups(site, fmt):
        return scale
    small = scale.movedim(site.channel_axis or 0, 0).reshape(-1, fmt.group_size)[:, 0].contiguous()
    return small if torch.equal(grow(small, site, fmt), scale) else scale


def grow(scale: Tensor, site: Site, fmt: Format) -> Tensor:
    """The inverse of :func:`shrink`."""
    if fmt.granularity != "group" or not site.parameter or tuple(scale.shape) != groups(site, fmt):
        return scale
    axis = site.channel_axis or 0
    front = torch.empty(site.shape, device="meta").movedim(axis, 0).shape
    return scale.repeat_interleave(fmt.group_size).reshape(front).movedim(0, axis).contiguous()


def check_grid(site: Site, fmt: Format, own: Mapping[str, Tensor]) -> None:
    """The values of a tap's tensors: scales positive and neither tiny nor huge, zero points whole and small.

    Raises:
        PlanishError: they are not.
    """
    scale, zero_point = own["scale"], own["zero_point"]
    largest = torch.finfo(torch.float32).max / 2 ** (fmt.bits + 1)
    if not bool(((scale >= torch.finfo(torch.float32).tiny) & (scale <= largest)).all()):  # false for NaN, too
        raise PlanishError(f"the scales of {shown(site.name)} are not positive and finite")
    if not bool(((zero_point == zero_point.round()) & (zero_point.abs() <= 2**fmt.bits)).all()):
        raise PlanishError(f"the zero points of {shown(site.name)} are not whole numbers among its codes")
    for name in BUFFERS[2:]:
        if name in own and not bool(own[name].isfinite().all()):
            raise PlanishError(f"the shifts of {shown(site.name)} are not finite")


def check_values(key: str, tensor: Tensor) -> Any:
    """Raise :class:`PlanishError` if a tensor holds NaN."""
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise PlanishError(f"{shown(key)} holds NaN")
    return tensor
