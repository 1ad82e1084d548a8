"""Attention that divides each row of its softmax output by the largest value before the product with the values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from planish.network.rebuilding import rebuilder

_BY_ROW = "planish_by_row"  # attribute of a module that does


@rebuilder("scale-rows")
def divide_rows(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Have the attentions in the modules at ``paths`` do it wherever their products are tapped; returns the paths.

    What a row is divided by is multiplied after the product, so that in float nothing changes.
    """
    for path in paths:
        setattr(model.get_submodule(path), _BY_ROW, True)
    return list(paths)


def divides_rows(module: nn.Module) -> bool:
    """Whether the attention in ``module`` does it."""
    return module.__dict__.get(_BY_ROW, False)
