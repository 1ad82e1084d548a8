"""A weight that stays in float while the network is trained, and is rounded afterwards."""

from __future__ import annotations

from torch import Tensor

from planish.functional import Grid
from planish.quantizers.ranges import fit_grid
from planish.quantizers.trainable import TrainableQuantizer


class LaterQuantizer(TrainableQuantizer):
    """Passes everything on as it is; ``baked`` rounds to the grid that the format's observer sets for it then.

    So what is baked does not compute what was trained, as it does for every other quantizer.
    """

    sharded = False  # it keeps the weight that it saw last

    def initialize(self, x: Tensor, grid: Grid) -> None:
        self.latest = x.detach()

    @property
    def grid(self) -> Grid:
        return fit_grid(self.latest, self.format, channel_axis=self.channel_axis)

    def forward(self, x: Tensor) -> Tensor:
        self.latest = x.detach()
        return x
