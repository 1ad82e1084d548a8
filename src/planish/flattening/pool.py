"""A pool of noise read at random offsets.

Drawing a fresh normal number for every activation costs more, on a CPU, than the convolution that follows. A pool is
drawn once; every request reads a contiguous piece at a random offset, and a small part of the pool is drawn anew at
every step, so that nothing repeats for long. The pieces pass the same statistical tests as fresh draws (mean, variance,
kurtosis, correlation between steps and between sites).
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from planish.errors import PlanishError

SIZE = 1 << 20
RENEWED = 1 << 13  # values drawn anew at every step
ALIGN = 16  # offsets are multiples of this, so that vector loads stay aligned
LIMIT = 1 << 22  # a longer tensor reads the same noise for several groups of images


class NoisePool:
    """Unit-variance noise of one law: ``"gaussian"`` or ``"uniform"`` (on ``[-sqrt(3), sqrt(3)]``)."""

    def __init__(self, law: str, seed: int, device: torch.device | str = "cpu", size: int = SIZE) -> None:
        if law not in ("gaussian", "uniform"):
            raise PlanishError(f"the noise law is {law!r}: choose gaussian or uniform")
        self.law, self.seed = law, seed
        self.generator = torch.Generator(device)
        self._offsets = random.Random(seed)
        self._begin(size)

    def _begin(self, size: int) -> None:
        self.generator.manual_seed(self.seed)
        self.values = self._draw(size)
        self._cursor = self._renewals = 0
        self._sizes = [(0, size)]  # after how many renewals the pool had grown to which size

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def _draw(self, size: int) -> Tensor:
        device = self.generator.device
        if self.law == "gaussian":
            return torch.randn(size, generator=self.generator, device=device)
        return torch.rand(size, generator=self.generator, device=device).sub_(0.5).mul_(math.sqrt(12.0))

    def renew(self, step: int) -> None:
        """Begin a step: offsets depend on (seed, step) alone, and the next piece of the pool is drawn anew."""
        self._offsets.seed(f"{self.seed}/{step}")
        self._renew_piece()

    def _renew_piece(self) -> None:
        self._renewals += 1
        piece = self.values[self._cursor : self._cursor + RENEWED]
        piece.copy_(self._draw(len(piece)))
        self._cursor = (self._cursor + RENEWED) % len(self.values)

    def read(self, count: int) -> Tensor:
        """``count`` values in a row, as a view of the pool."""
        if count + ALIGN > len(self.values):
            self._grow(2 * count + ALIGN)
        last = (len(self.values) - count) // ALIGN
        offset = self._offsets.randint(0, last) * ALIGN
        return self.values[offset : offset + count]

    def _grow(self, size: int) -> None:
        self.values = torch.cat([self.values, self._draw(size - len(self.values))])
        self._sizes.append((self._renewals, size))

    def like(self, x: Tensor) -> Tensor:
        """Noise that broadcasts against ``x``: of its shape and memory order, or, above ``LIMIT`` values, of a part of
        the batch (``x`` must then be viewed as ``(groups, part, ...)``; see :func:`grouped`).
        """
        piece = self.read(x.numel())
        if x.is_contiguous():
            return piece.view(x.shape)
        if _dense(x):
            return piece.as_strided(x.shape, x.stride())
        return piece.view(x.shape)

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": self.values, "generator": self.generator.get_state(), "cursor": self._cursor,
            "seed": self.seed, "renewals": self._renewals, "sizes": self._sizes,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state; that of a pool with another seed says how far this one has come.

        Of several processes with a seed each, only one writes its state: the others draw theirs again.
        """
        if state["seed"] != self.seed:
            self._draw_again([(renewals, size) for renewals, size in state["sizes"]], state["renewals"])
            return
        self.values = state["values"].to(self.generator.device)
        self.generator.set_state(state["generator"].cpu())
        self._cursor, self._renewals = state["cursor"], state["renewals"]
        self._sizes = [(renewals, size) for renewals, size in state["sizes"]]

    def _draw_again(self, sizes: list[tuple[int, int]], renewals: int) -> None:
        self._begin(sizes[0][1])
        for grown, size in sizes[1:]:
            while self._renewals < grown:
                self._renew_piece()
            self._grow(size)
        while self._renewals < renewals:
            self._renew_piece()


def grouped(x: Tensor) -> Tensor:
    """View a long batch as ``(groups, part, ...)`` so that one piece of noise serves every group."""
    if x.numel() <= LIMIT or not x.is_contiguous() or x.shape[0] < 2:
        return x
    groups = next(
        g for g in range(2, x.shape[0] + 1) if (x.shape[0] % g == 0 and x.numel() // g <= LIMIT) or g == x.shape[0]
    )
    return x.view(groups, x.shape[0] // groups, *x.shape[1:])


def _dense(x: Tensor) -> bool:
    """Whether the values fill their storage in some order of the dimensions (a channels-last tensor does)."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
