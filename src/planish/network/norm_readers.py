"""Which linear layers read the output of a LayerNorm, and nothing else does: found by watching one forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.network.batches import call_model
from planish.network.modes import evaluating

# Functions that only move tokens about: what is in a channel before is in the same channel afterwards, if the last
# dimension is what it was. That a permutation did not exchange it for another as long, only the outputs can tell.
_T = Tensor
_MOVES = {
    _T.view, _T.reshape, _T.permute, _T.transpose, _T.flatten, _T.unflatten, _T.contiguous, _T.roll, _T.__getitem__,
    _T.select, _T.narrow, _T.squeeze, _T.unsqueeze, torch.reshape, torch.permute, torch.transpose, torch.flatten,
    torch.roll, torch.squeeze, torch.unsqueeze, torch.select, torch.narrow,
}  # fmt: skip
_SHAPES = {_T.new_zeros, _T.new_ones, _T.new_empty, _T.new_full, torch.zeros_like, torch.ones_like, torch.empty_like}


@dataclass
class _Read:
    """The output of one LayerNorm and who reads it."""

    norm: tuple[Tensor, Tensor | None]  # weight and bias
    width: int
    linears: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    elsewhere: bool = False


class _Follower(TorchFunctionMode):
    """Follows the outputs of LayerNorm through what moves tokens, up to those who compute with them."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, _Read] = {}  # by the identity of a tensor
        self.alive: list[Tensor] = []  # an address must not be given to another tensor
        self.reads: list[_Read] = []
        self.uses: Counter[int] = Counter()  # of parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _SHAPES or not tensors_in(result):  # a question about shape or dtype
            return result
        given = tensors_in((args, kwargs))
        self.uses.update(id(tensor) for tensor in given if isinstance(tensor, nn.Parameter))
        for tensor in given:
            if id(tensor) in self.of and result is not tensor:  # dropout in evaluation mode gives its input back
                self._read(self.of[id(tensor)], tensor, func, args, kwargs, result)
        if func is F.layer_norm:
            weight, bias = _argument(args, kwargs, 2, "weight"), _argument(args, kwargs, 3, "bias")
            if weight is not None and weight.dim() == 1:
                read = _Read((weight, bias), result.shape[-1])
                self.reads.append(read)
                self._follow(read, result)
        return result

    def _read(self, read: _Read, tensor: Tensor, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is F.linear:
            weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
            read.elsewhere |= weight is tensor or bias is tensor
            read.linears.append((weight, bias))
        elif (func in _MOVES and result.shape[-1] == read.width) or (func is F.pad and result.shape == tensor.shape):
            self._follow(read, result)
        else:
            read.elsewhere = True

    def _follow(self, read: _Read, tensor: Tensor) -> None:
        self.of[id(tensor)] = read
        self.alive.append(tensor)


def _argument(args: Any, kwargs: Any, position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def find_norm_readers(model: nn.Module, example: Any) -> list[tuple[str, list[str]]]:
    """(path of a LayerNorm with a weight, paths of the linear layers) where only these layers read what it puts out.

    The output may be reshaped, permuted, rolled or indexed on the way (windows of Swin, the class token). Each layer
    multiplies with its parameters as they are; norms and layers that run twice or share parameters are left out.
    """
    follower = _Follower()
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), follower:
        returned = call_model(model, example)
    for tensor in tensors_in(returned):
        if id(tensor) in follower.of:
            follower.of[id(tensor)].elsewhere = True
    # a layer is known by its weight and bias: both must be its own parameters, used as they are
    owners = {
        (id(m._parameters["weight"]), id(m._parameters["bias"])): path
        for path, m in model.named_modules()
        if m._parameters.get("weight") is not None and "bias" in m._parameters
    }
    found = []
    for read in follower.reads:
        paths = [owners.get((id(weight), id(bias))) for weight, bias in [read.norm, *read.linears]]
        inside = [t for pair in [read.norm, *read.linears] for t in pair if t is not None]
        once = all(follower.uses[id(tensor)] == 1 for tensor in inside)
        named = [path for path in paths if path is not None]
        if once and not read.elsewhere and 1 < len(named) == len(paths):
            found.append((named[0], named[1:]))
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested sequences and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []
