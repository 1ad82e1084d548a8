"""The outputs of the quantized layers, in the network in training and in its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from planish.network import Product


def layer_axes(model: nn.Module, layers: Sequence[Product]) -> dict[str, int]:
    """The linear layers and convolutions among the quantized products by their paths, in the order of execution, with
    the axis that holds the channels of their outputs: 1 of a convolution, -1 of a linear layer whatever its shape."""
    modules = {product.module: model.get_submodule(product.module) for product in layers}
    convolution = nn.modules.conv._ConvNd
    return {
        path: 1 if isinstance(module, convolution) else -1
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, convolution))
    }


def _nothing(*args: Any) -> None:
    """What a copied hook does."""


class OwnHook:
    """A hook of one network only: in a copy of it, such as a moving average that teaches, nothing takes its place.

    A function is copied by reference, and would act on the network in training whenever the copy runs.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return self.hook(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return _nothing


class Outputs:
    """Forward hooks that keep the latest output of some modules; ``take`` hands them over and forgets them.

    What follows a module may work in place on its output (``nn.ReLU(inplace=True)``). Copies of all would double what a
    step holds, so every output is copied in the first step only, which shows who is worked on, and later only these.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self.originals: dict[str, tuple[Tensor, int]] = {}  # with the changes in place that they had when they came
        self.changes: dict[str, bool] = {}  # whether the output of a module was ever changed in place
        self.handles = [model.get_submodule(path).register_forward_hook(self._keeper(path)) for path in paths]

    def _keeper(self, path: str) -> OwnHook:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if torch.compiler.is_compiling() or output.is_inference():  # neither counts changes in place
                self.kept[path] = output.clone()
                return
            changes = self.changes.get(path)
            if not changes:
                self.originals[path] = output, output._version
            self.kept[path] = output if changes is False else output.clone()

        return OwnHook(keep)

    def take(self) -> dict[str, Tensor]:
        """What was kept since the last call, by the module's path; without an output that is changed in place for the
        first time after the first step, when it was not copied."""
        for path, (original, version) in self.originals.items():
            changed = original._version != version
            if changed and self.changes.get(path) is False:
                del self.kept[path]
            self.changes[path] = changed
        kept, self.kept, self.originals = self.kept, {}, {}
        return kept

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.kept, self.originals = {}, {}
