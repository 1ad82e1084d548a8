"""What norm tuning trains: affine parameters of norms, and what stands for those of a BatchNorm that is folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish.ptq.outputs import Layer, along_channels, change_outputs


class Output(nn.Module):
    """``exp(log_factor) * y + shift`` for each output channel of a layer; no factor if the layer's grid takes none."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        module: Any = layer.module
        count = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        device = module._parameters["weight"].device
        self.log_factor = nn.Parameter(torch.zeros(count, device=device)) if layer.tap is not None else None
        self.shift = nn.Parameter(torch.zeros(count, device=device))

    @property
    def factor(self) -> Tensor | None:
        return None if self.log_factor is None else self.log_factor.exp()

    def forward(self, y: Tensor) -> Tensor:
        if self.factor is not None:
            y = y * along_channels(self.layer.module, self.factor.to(y.dtype))
        return y + along_channels(self.layer.module, self.shift.to(y.dtype))


def norm_parameters(model: nn.Module, but: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters, by name, of every module whose class is called a norm (``LayerNorm``, ``BatchNorm2d``,
    ``RmsNorm``, ``LayerNorm2d``, ...), save for the modules at the paths ``but``."""
    skipped = set(but)
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and path not in skipped
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
    }


class Affines:
    """The tensors that are trained, all else in the network being frozen."""

    def __init__(self, norms: Mapping[str, nn.Parameter], layers: Iterable[Layer] = ()) -> None:
        self.norms = dict(norms)
        self.outputs = {layer.path: Output(layer) for layer in layers}

    def parameters(self) -> list[nn.Parameter]:
        return [
            *self.norms.values(),
            *(p for output in self.outputs.values() for p in output.parameters(recurse=False)),
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The layers put out what their factors and shifts say, and gradients reach the parameters."""
        with ExitStack() as stack:
            for output in self.outputs.values():
                hook = output.layer.module.register_forward_hook(lambda module, inputs, y, output=output: output(y))
                stack.callback(hook.remove)
            for parameter in self.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(True)
            yield

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        return [parameter.clone() for parameter in self.parameters()]

    @torch.no_grad()
    def put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def bake(self) -> None:
        """Move factors and shifts into grids and biases."""
        for output in self.outputs.values():
            change_outputs(output.layer, output.factor, output.shift)
        self.outputs = {}
