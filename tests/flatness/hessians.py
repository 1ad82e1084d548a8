"""Hessians in one piece, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.flatness.networks import images

Batches = list[tuple[Tensor, Tensor]]


class SpelledOutNorm(nn.Module):
    """LayerNorm over the last dimension by its formula.

    The transforms of torch.func differentiate ``F.layer_norm`` twice wrongly (seen with PyTorch 2.15; issue 196700
    of pytorch/pytorch is about the same); differences of gradients tell.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def spelled_out(model: nn.Module) -> nn.Module:
    """A copy whose LayerNorms are formulas; parameters have their old names."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SpelledOutNorm(module))
    return model


def double_problem(make: Callable[[], nn.Module]) -> tuple[nn.Module, Batches]:
    """A network and 20 images in batches of 12 and 8, in float64."""
    return make().double(), [(x.double(), y) for x, y in images(make(), 20, 12)]


def dense_hessian(
    model: nn.Module, batches: Batches, names: list[str] | None = None, loss: Callable = F.cross_entropy
) -> Tensor:
    """(weights, weights), by torch.func: of the mean loss over all images, in the order of the parameters."""
    model = spelled_out(model)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    values = {name: p.detach() for name, p in model.named_parameters() if names is None or name in names}
    sizes = [value.numel() for value in values.values()]

    def mean_loss(flat: Tensor) -> Tensor:
        parts = zip(values.items(), flat.split(sizes), strict=True)
        return loss(functional_call(model, {name: part.view_as(v) for (name, v), part in parts}, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):
        return hessian(mean_loss)(torch.cat([value.flatten() for value in values.values()]))


@cache
def true_hessian(make: Callable[[], nn.Module]) -> Tensor:
    """Of :func:`double_problem`, cross-entropy, all parameters; not to be written to."""
    return dense_hessian(*double_problem(make))
