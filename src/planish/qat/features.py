"""The outputs of the quantized layers, in the network in training and in its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from planish.network import Product


def layer_paths(model: nn.Module, layers: Sequence[Product]) -> list[str]:
    """The linear layers and convolutions among the quantized products, in the order of execution, each once."""
    paths = dict.fromkeys(product.module for product in layers)
    return [p for p in paths if isinstance(model.get_submodule(p), (nn.Linear, nn.modules.conv._ConvNd))]


class Outputs:
    """Forward hooks that keep the latest output of some modules; ``take`` hands them over and forgets them."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self.handles = [model.get_submodule(path).register_forward_hook(self._keeper(path)) for path in paths]

    def _keeper(self, path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept[path] = output

        return keep

    def take(self) -> dict[str, Tensor]:
        """What was kept since the last call, by the module's path."""
        kept, self.kept = self.kept, {}
        return kept

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.kept = {}
