"""DoReFa: weights squashed by tanh, then rounded to levels spread evenly between -1 and 1."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.functional import Grid, fake_quantize
from planish.quantizers.ranges import SMALLEST
from planish.quantizers.trainable import TrainableQuantizer


class DoReFaQuantizer(TrainableQuantizer):
    """``M * (2 round((tanh w / 2M + 1/2) n) / n - 1)`` with ``M = max |tanh w|``, ``n = 2^bits - 1`` (Zhou et al. 2016,
    arXiv 1606.06160, equation 9, times M).

    The paper leaves M out, so that weights span [-1, 1] and a BatchNorm after each layer takes the change of scale
    back; with it the quantizer suits a trained network and layers without a norm. The levels are the half-integer
    grid of one scale, ``2 M / n``. The gradient passes straight through the rounding and takes tanh's slope.
    """

    def initialize(self, x: Tensor, grid: Grid) -> None:
        if not self.format.half_integer or self.format.granularity != "tensor":
            raise PlanishError("DoReFa's levels are a half-integer grid with one scale: its format has to say so")
        self.latest = x.detach()

    def latent(self, x: Tensor) -> Tensor:
        return x.detach().float().tanh()

    def _grid(self, squashed: Tensor) -> Grid:
        f = self.format
        scale = 2 * squashed.abs().max().clamp(min=SMALLEST) / (f.qmax - f.qmin)
        return Grid(scale, torch.zeros_like(scale), f.qmin, f.qmax, f.offset)

    @property
    def grid(self) -> Grid:
        return self._grid(self.latent(self.latest))

    def forward(self, x: Tensor) -> Tensor:
        self.latest = x.detach()
        squashed = x.float().tanh()
        rounded = fake_quantize(squashed.detach(), self._grid(squashed.detach()))
        return (rounded + (squashed - squashed.detach())).to(x.dtype)
