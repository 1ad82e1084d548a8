"""Pairs of layers with nothing between them but positively homogeneous functions: ``f(s x) = s f(x)`` for ``s > 0``.

In such a pair each channel of the tensor in between can be scaled, by dividing what the first layer puts out and
multiplying what the second one takes in. The pairs are found by watching one forward pass, by identity of tensors.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.network.batches import call_model
from planish.network.folding import tensors_in
from planish.network.modes import evaluating
from planish.network.products import SIGNATURES

_ELEMENTWISE = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_,
                torch.prelu, F.prelu, F.dropout, F.dropout2d, torch.dropout, Tensor.contiguous}  # fmt: skip
# These treat every channel by itself where the channels are dimension 1.
_POOLS = {
    getattr(F, name.format(n))
    for n in (1, 2, 3)
    for name in ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d")
}
_CLIPPED = {F.relu6, F.hardtanh, F.hardtanh_}
_FLATTEN = {torch.flatten, Tensor.flatten}


@dataclass(frozen=True)
class Chain:
    """Two layers by their paths.

    Attributes:
        repeats: consecutive input features of the second layer that belong to one output channel of the first (more
            than 1 where a feature map is flattened).
        clipped: a ReLU6 or the like stands between, so the pair is not homogeneous after all.
    """

    first: str
    second: str
    repeats: int = 1
    clipped: bool = False


@dataclass
class _Event:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class _Tracer(TorchFunctionMode):
    """Keeps every call by the tensors that it read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[int, list[_Event]] = defaultdict(list)
        self.products: list[_Event] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if tensors_in(result):  # else it is a question about shape or dtype
            event = _Event(func, args, kwargs, result)  # which keeps the tensors, so no address is used twice
            for tensor in tensors_in((args, kwargs)):
                self.reads[id(tensor)].append(event)
            signature = SIGNATURES.get(func)
            if signature is not None and signature.weighted:
                self.products.append(event)
        return result


def find_chains(model: nn.Module, example: Any) -> list[Chain]:
    """Every such pair in the order of execution; the tensor in between feeds nothing but the second layer.

    Both layers must multiply with a parameter of their own called ``weight``, once, and add their own bias or none. A
    BatchNorm that was folded (mean and bias are 0) may stand between, as may poolings of a feature map and its
    flattening. The layers of a network that has taps are not found.
    """
    tracer = _Tracer()
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), tracer:
        returned = {id(tensor) for tensor in tensors_in(call_model(model, example))}
    layers = {}
    for path, module in model.named_modules():
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is not None and len(tracer.reads[id(weight)]) == 1 and "bias" in module._parameters:
            event = tracer.reads[id(weight)][0]
            own_bias = event.argument(2, "bias") is bias and (bias is None or len(tracer.reads[id(bias)]) == 1)
            if event.argument(1, "weight") is weight and own_bias:
                layers[id(event)] = path
    chains = []
    for event in tracer.products:
        if id(event) in layers and (found := _follow(tracer, event, returned)) is not None:
            second, repeats, clipped = found
            if id(second) in layers:
                chains.append(Chain(layers[id(event)], layers[id(second)], repeats, clipped))
    return chains


def _is_linear(event: _Event) -> bool:
    return event.func is F.linear


def _follow(tracer: _Tracer, first: _Event, returned: set[int]) -> tuple[_Event, int, bool] | None:
    """The product that alone reads the output of ``first``, through homogeneous functions; how often channels repeat
    in its input; whether one of the functions clips."""
    tensor: Tensor = first.result
    if not _is_linear(first) and tensor.dim() != first.argument(1, "weight").dim():  # a feature map without a batch
        return None
    mapped = not _is_linear(first) or tensor.dim() == 2  # channels on dimension 1; else on the last one
    channels, clipped, place = tensor.shape[1 if mapped else -1], False, 0
    while id(tensor) not in returned and place < len(tracer.reads[id(tensor)]):
        event = tracer.reads[id(tensor)][place]
        last = place + 1 == len(tracer.reads[id(tensor)])
        if event.argument(0, "input") is not tensor or not isinstance(event.result, Tensor):
            return None
        signature = SIGNATURES.get(event.func)
        if signature is not None and signature.weighted:
            fits = mapped == (not _is_linear(event)) or tensor.dim() == 2
            return (event, tensor.shape[1 if mapped else -1] // channels, clipped) if last and fits else None
        if not _homogeneous(event, mapped) and event.func not in _CLIPPED:
            return None
        clipped = clipped or event.func in _CLIPPED
        if event.result is tensor:  # changed in place, or not at all
            place += 1
        elif last:
            tensor, place = event.result, 0
        else:
            return None
    return None


def _homogeneous(event: _Event, mapped: bool) -> bool:
    """Whether the function leaves a positive factor of each channel as it is (the output with ``mapped`` channels on
    dimension 1)."""
    if event.func in _ELEMENTWISE:
        return True
    if event.func is F.batch_norm:  # one that was folded
        mean, bias = event.argument(1, "running_mean"), event.argument(4, "bias")
        return mean is not None and not bool(mean.any()) and (bias is None or not bool(bias.any()))
    if not mapped:
        return False
    if event.func is F.pad:
        beyond = len(event.argument(1, "pad")) > 2 * (event.args[0].dim() - 2)
        return not beyond and not event.argument(3, "value")
    if event.func in _FLATTEN:
        return bool(event.argument(1, "start_dim", 0) == 1 and event.argument(2, "end_dim", -1) == -1)
    return event.func in _POOLS
