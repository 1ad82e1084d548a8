"""A tensor of quantized values that remembers its codes.

A tap gives a tensor back, and what enters the product is that tensor or a rearrangement of it: a chunk of a weight, a
key transposed, an image padded by reflection. So the codes travel with the tensor. :class:`Coded` is a float tensor
with the values of the fake-quantized network, which every operation may use as such; functions that only move
elements move the codes and their grid along, and all others give a plain tensor, which has no codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

T = torch.Tensor
_BOTH = (
    "transpose", "permute", "reshape", "flatten", "unflatten", "chunk", "split", "tensor_split", "unbind", "narrow",
    "select", "squeeze", "unsqueeze", "t", "clone", "detach", "movedim", "moveaxis", "swapaxes", "swapdims", "flip", "roll",
    "repeat_interleave", "index_select",
)  # fmt: skip
_METHODS = ("contiguous", "expand", "expand_as", "repeat", "__getitem__", "swapaxes", "swapdims")
MOVES = {
    *(getattr(space, name) for name in _BOTH for space in (torch, T)),
    *(getattr(T, name) for name in _METHODS),
    *(getattr(T, name).__get__ for name in ("T", "mT")),
}
_FIELDS = ("codes", "zero_point", "scale", "part", "after")


class Coded(Tensor):
    """Float values ``(code - zero_point + offset) * scale + after``, and what they are made of.

    Attributes (tensors of the shape of the values; expanded, not copied, where they are constant):
        codes: uint8, or int8 where a code may be negative; ``None`` once the values were changed in place.
        zero_point: int32.
        scale: float32.
        part: int32, the group of each element along the sum, or ``None`` if the format has no groups.
        after: what a :class:`~planish.quantizers.ShiftedQuantizer` adds, or ``None``.
        offset: 0.5 on the half-integer grid, else 0.
        tap: who made it; its ``products`` compute the matrix products that the tensor enters.
    """

    codes: Tensor | None
    zero_point: Tensor
    scale: Tensor
    part: Tensor | None
    after: Tensor | None
    offset: float
    tap: Any
    version: int

    @staticmethod
    def make(values: Tensor, fields: dict[str, Any], offset: float, tap: Any) -> Coded:
        out: Coded = values.detach().as_subclass(Coded)
        for name in _FIELDS:
            setattr(out, name, fields[name])
        out.offset, out.tap, out.version = offset, tap, _version(values)
        return out

    @property
    def steps(self) -> Tensor:
        """The integers of which the values (without ``after``) are ``unit`` each, exactly; int32.

        ``code - zero_point``; on the half-integer grid, whose values are ``(q + 1/2) s``, the odd ``2 q + 1``.
        """
        assert self.codes is not None
        steps = self.codes.to(torch.int32) - self.zero_point
        return 2 * steps + 1 if self.offset else steps

    @property
    def unit(self) -> Tensor:
        """The scale of one step: ``scale``, or half of it on the half-integer grid (which is exact)."""
        return self.scale / 2 if self.offset else self.scale

    @property
    def plain(self) -> Tensor:
        """The values as an ordinary tensor."""
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            first = args[0] if args else None
            if isinstance(first, Coded) and first.codes is not None:
                if func in MOVES:
                    return _moved(first, lambda tensor: func(tensor, *args[1:], **kwargs))
                if func is T.view and not isinstance(args[1], torch.dtype):
                    return _moved(first, lambda tensor: tensor.reshape(*args[1:]))  # expanded grids have no other view
                if func is F.pad and (kwargs.get("mode") or (args[2:3] or ("constant",))[0]) != "constant":
                    return _moved(first, lambda tensor: _padded(tensor, *args[1:], **kwargs))
            found = list(_coded_among((args, kwargs)))
            out = found[0].tap.products.__torch_function__(func, types, args, kwargs)
            for coded in found:
                if _version(coded) != coded.version:  # it was changed in place
                    coded.codes = None
            return out


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; copies made in inference mode do not know it."""
    return -1 if tensor.is_inference() else tensor._version


def _padded(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.pad(tensor.double(), *args, **kwargs).to(tensor.dtype)  # which PyTorch cannot do with integers


def _moved(coded: Coded, move: Callable[[Tensor], Any]) -> Any:
    """What ``move`` gives for the values, with the codes and the grid moved in the same way."""
    values = move(coded.plain)
    fields = {name: None if (t := getattr(coded, name)) is None else move(t) for name in _FIELDS}
    if isinstance(values, Tensor):
        return Coded.make(values, fields, coded.offset, coded.tap)
    parts: list[Coded] = []
    for i, part in enumerate(values):
        ith = {name: None if t is None else t[i] for name, t in fields.items()}
        parts.append(Coded.make(part, ith, coded.offset, coded.tap))
    return tuple(parts)


def _coded_among(value: Any) -> Iterator[Coded]:
    """The coded tensors in the arguments of a function."""
    if isinstance(value, Coded):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _coded_among(item)
