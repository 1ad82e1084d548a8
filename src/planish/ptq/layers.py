"""The calls of layers with weights, as plain matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.network import Assignment, Site

CHUNK = 2**24  # numbers in the columns that are unfolded at once

_LAYER = ("input", "weight", "bias")
_CONVOLUTION = (*_LAYER, "stride", "padding", "dilation", "groups")
_FUNCTIONS: dict[Any, tuple[str, ...]] = {F.linear: _LAYER, torch.addmm: ("bias", "input", "weight")}
_FUNCTIONS |= {
    f: _CONVOLUTION for n in (1, 2, 3) for f in (getattr(F, f"conv{n}d"), getattr(torch, f"conv{n}d"))
}  # fmt: skip
_OTHER_NAMES = {"mat1": "input", "mat2": "weight", "input": "bias"}  # of torch.addmm
OPERATORS = ("linear", "addmm", "conv1d", "conv2d", "conv3d")


@dataclass
class LayerCall:
    """One call of a layer with a weight, seen as ``y = W x`` for every group of channels.

    A weight is a (G, R, K) matrix: groups, output channels and inputs of one group. G is 1 except for convolutions
    with groups. The inputs are (G, K, M) columns: for a convolution, the patches under its kernel.
    """

    site: str
    function: Callable[..., Tensor]
    args: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """As the layer holds it."""
        found: Tensor = self.args["weight"]
        return found

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.args.get("bias")
        return found

    @property
    def groups(self) -> int:
        return int(self.args.get("groups", 1))

    @property
    def transposed(self) -> bool:
        """Whether the weight is held as (in, out)."""
        return self.function is torch.addmm

    def output(self) -> Tensor:
        return self.function(**_named(self.function, self.args))

    def matrix(self, like_weight: Tensor) -> Tensor:
        """A tensor of the weight's shape, or one that broadcasts to it, as (G, R, K)."""
        full = like_weight.expand(self.weight.shape)
        return full.T[None] if self.transposed else full.reshape(self.groups, len(full) // self.groups, -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return matrix[0].T if self.transposed else matrix.reshape(self.weight.shape)

    def columns(self, like_output: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The inputs (G, K, M) in float32, a chunk of images at a time, and those columns of an output (G, R, M)."""
        x = self.args["input"]
        if "groups" not in self.args:
            x = x.reshape(1, -1, x.shape[-1])
            outputs = None if like_output is None else like_output.reshape(1, -1, like_output.shape[-1])
            size = max(1, CHUNK // x.shape[-1])
            for i in range(0, x.shape[1], size):
                out = None if outputs is None else outputs[:, i : i + size].transpose(1, 2).float()
                yield x[:, i : i + size].transpose(1, 2).float(), out
            return
        kernel = self.weight.shape[2:]
        if x.dim() == len(kernel) + 1:  # one image, without a dimension for the batch
            x, like_output = x[None], None if like_output is None else like_output[None]
        size = max(1, CHUNK // max(1, x[:1].numel() * kernel.numel()))
        for i in range(0, len(x), size):
            out = None
            if like_output is not None:
                part = like_output[i : i + size].float()
                out = part.transpose(0, 1).reshape(self.groups, part.shape[1] // self.groups, -1)
            names = ("stride", "padding", "dilation", "groups")
            yield patches(x[i : i + size].float(), kernel, **{name: self.args[name] for name in names}), out


def patches(
    x: Tensor, kernel: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """What is under the kernel of a convolution at each of its places.

    Args:
        x: (N, C, *spatial) of one, two or three spatial dimensions.
        kernel, stride, padding, dilation, groups: as PyTorch's convolutions take them; padding also as ``"same"``.

    Returns:
        (groups, K, M): K is channels of a group times places of the kernel, in the order of a flattened weight; M is
        images times places of the output.
    """
    n = len(kernel)
    stride, dilation = _each(stride, n), _each(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        ends = [(t // 2, t - t // 2) for t in total]
    else:
        ends = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    x = F.pad(x, [p for pair in reversed(ends) for p in pair])
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))  # (N, G, C of a group, *output, *kernel)
    x = x.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    return x.reshape(groups, x.shape[1] * torch.Size(kernel).numel(), -1)


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * n if len(values) == 1 else values


def layer_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by name; ``None`` where it is no layer's, and for an ``addmm`` that scales its parts."""
    if function not in _FUNCTIONS:
        return None
    if function is torch.addmm:
        kwargs = {_OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}
    bound = {**dict(zip(_FUNCTIONS[function], args, strict=False)), **kwargs}
    if len(args) > len(_FUNCTIONS[function]) or not bound.keys() <= set(_FUNCTIONS[function]):
        return None
    if "groups" in _FUNCTIONS[function]:
        bound = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **bound}
    return bound


def _named(function: Any, args: dict[str, Any]) -> dict[str, Any]:
    if function is not torch.addmm:
        return args
    names = {ours: theirs for theirs, ours in _OTHER_NAMES.items()}
    return {names[name]: value for name, value in args.items()}


def layer_weights(assignment: Assignment) -> dict[str, Site]:
    """The weights that a walk can halt at (``ptq/walk.py``): parameters in linear layers and convolutions."""
    found = (p.weight for p in assignment.products if p.operator in OPERATORS)
    return {site.name: site for site in found if site is not None and site.parameter}


def parameter_at(model: nn.Module, site: Site) -> nn.Parameter:
    """The parameter of a weight's site."""
    found = model.get_submodule(site.owner)._parameters[site.slot]
    assert found is not None
    return found
