"""A linear map beside a block, as one of the changes of structure that a file can name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from planish.network.rebuilding import rebuilder

CHILD = "planish_compensation"


def _compensated_class(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = self._modules[CHILD](x)  # first: the block may change x in place
        return cls.forward(self, x, *args, **kwargs) + added

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


@rebuilder("block-compensation")
def add_compensation(model: nn.Module, blocks: Sequence[Sequence[Any]]) -> list[str]:
    """Put a linear map, zero as yet, beside blocks of ``model``, in place; returns their paths.

    The block's class is exchanged for a subclass, so that all parameters keep their names.

    Args:
        blocks: for each block its path, its channels, and whether they are on dimension 1 (a 1 x 1 convolution) or on
            the last one (a linear layer).
    """
    for path, channels, convolution in blocks:
        block = model.get_submodule(path)
        like = next(p for p in block.parameters() if p.is_floating_point())
        kind: Any = nn.Conv2d(channels, channels, 1) if convolution else nn.Linear(channels, channels)
        added = kind.to(like).requires_grad_(False)
        for parameter in added.parameters():
            parameter.zero_()
        block.add_module(CHILD, added)
        block.__class__ = _compensated_class(type(block))
    return [path for path, *_ in blocks]
