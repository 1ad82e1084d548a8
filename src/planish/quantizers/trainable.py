"""What every quantizer that is trained with the network can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planish.functional import Grid, fake_quantize
from planish.quantizers.uniform import UniformQuantizer
from planish.scheme import Format


class TrainableQuantizer(nn.Module):
    """A tap whose grid moves while the network is trained.

    Subclasses define ``grid``, the grid as it stands, and ``forward``, whose values lie on it. ``initialize`` is called
    once, with the tensor that will pass (a weight, or the activations of calibration images) and the grid that the
    format's observer chose for it. Parameters stay in float32 whatever the network is cast to: a scale in bfloat16 has
    three significant digits.
    """

    def __init__(self, format: Format, *, channel_axis: int = 0) -> None:
        super().__init__()
        self.format = format
        self.channel_axis = channel_axis

    def initialize(self, x: Tensor, grid: Grid) -> None:
        """Set the parameters before training starts."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """The grid as it stands, its scale positive and its zero point whole."""
        raise NotImplementedError

    def latent(self, x: Tensor) -> Tensor:
        """What is rounded to the grid: ``x`` itself, unless the method transforms it first (DoReFa)."""
        return x

    def keep_valid(self) -> None:
        """After an optimizer step: bring parameters that left their domain back into it."""

    def baked(self) -> UniformQuantizer:
        """The quantizer that is shipped: the grid as it stands, in place of what was trained."""
        tap = UniformQuantizer(self.format, channel_axis=self.channel_axis)
        tap.grid = self.grid
        return tap

    def extra_repr(self) -> str:
        return self.format.describe()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableQuantizer:
        """Follow moves between devices but not changes of dtype."""
        kept = {
            name: tensor.detach().clone()
            for name, tensor in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        }
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved: Any = getattr(self, name)
            if moved.dtype != before.dtype:
                moved.data = before.to(moved.device)
        return self


class FixedQuantizer(TrainableQuantizer):
    """The calibrated grid, left as it is; the gradient passes straight through inside the range."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, format: Format, *, channel_axis: int = 0) -> None:
        super().__init__(format, channel_axis=channel_axis)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    def initialize(self, x: Tensor, grid: Grid) -> None:
        self.scale, self.zero_point = grid.scale.detach().clone(), grid.zero_point.detach().clone()

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero_point, self.format.qmin, self.format.qmax, self.format.offset)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.grid)
