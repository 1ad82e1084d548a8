"""WQER and AQER: recorders of the error that the predefined quantizer really makes.

Both keep exponential moving averages of the mean and the variance of ``e = Q(x) - x`` (arXiv 2511.01462): WQER for
every output channel of a weight, AQER for the whole input of a layer. The range of ``Q`` is fitted once and then
follows the tensor: at each refresh the scale moves towards the best of three candidates, which costs three passes
instead of a search; a tensor that runs away from its range is fitted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from planish.functional import Grid, fake_quantize, limits
from planish.quantizers import fit_grid
from planish.quantizers.ranges import SMALLEST
from planish.scheme import Format
from planish.training.engine import gather_rows

CANDIDATES = (0.93, 1.0, 1.075)
JUMP = 2.0  # an error variance that exceeds its average by this factor makes the range be fitted anew
FOLLOW = 0.5  # how far the scale moves towards the best candidate
SAMPLE = 8_192  # activations looked at when a recorder is refreshed
TOGETHER = 1 << 16  # values up to which the candidates are tried in one go: of so few, an operation costs its call


class ErrorRecorder:
    """The grid of one tensor, and the running mean and variance of its quantization error.

    ``mean`` and ``variance`` have the shape of the grid's scale: one number per output channel of a weight, one for an
    activation. ``nonzero`` is the running share of values that are not exactly zero.
    """

    def __init__(
        self, format: Format, *, channel_axis: int | None = None, beta: float = 0.9, nonzero_only: bool = False
    ):
        self.format, self.axis, self.beta, self.nonzero_only = format, channel_axis, beta, nonzero_only
        self.grid: Grid | None = None
        self.mean = self.variance = torch.zeros(())
        self.nonzero = 1.0

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Take in the tensor as it is now; the first call copies, later ones average."""
        x = x.detach().float()
        if self.grid is None:
            self.grid = fit_grid(x, self.format, channel_axis=self.axis or 0)
            beta = 0.0
        else:
            self.grid, beta = self._follow(x, self.grid), self.beta
        mean, variance, present = self._moments(x, self.grid)
        if beta and variance.mean() > JUMP * self.variance.mean():
            # the tensor has run away from its range (it was all zeros before, say): following would take too long
            self.grid = fit_grid(x, self.format, channel_axis=self.axis or 0)
            mean, variance, present = self._moments(x, self.grid)
        self.nonzero = beta * self.nonzero + (1 - beta) * present
        self.mean = beta * self.mean.to(mean.device) + (1 - beta) * mean
        self.variance = beta * self.variance.to(mean.device) + (1 - beta) * variance

    def reduce(self, accelerator: Accelerator) -> None:
        """Average over all processes what each measured on its own part of the batch."""
        assert self.grid is not None
        parts = [
            self.grid.scale,
            self.grid.zero_point,
            self.mean,
            self.variance,
            torch.full_like(self.mean, self.nonzero),
        ]
        both = accelerator.reduce(torch.cat([part.reshape(-1) for part in parts]), "mean")
        pieces = both.split([part.numel() for part in parts])
        scale, zero_point, self.mean, self.variance, nonzero = (
            piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)
        )
        self.grid = self.grid._replace(scale=scale, zero_point=zero_point.round())
        self.nonzero = nonzero.mean().item()

    def _moments(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, float]:
        """Mean and variance of the error over everything that shares a scale; the share of values that are not 0."""
        error = fake_quantize(x, grid).sub_(x)
        present = torch.count_nonzero(x).item() / max(1, x.numel())
        if self.nonzero_only and present < 1:
            weights = torch.ne(x, 0, out=torch.empty_like(x))
            count = self._sum(weights).clamp(min=1)
            mean = self._sum(error * weights) / count
            return mean, self._sum((error - mean).square_().mul_(weights)) / count, present
        mean = self._mean(error)
        return mean, self._mean((error - mean).square_()), present

    def _sum(self, x: Tensor, ahead: int = 0) -> Tensor:
        """Sum over everything that shares a scale; the result broadcasts against the tensor.

        So many dimensions ``ahead`` of those of the tensor, which number several tensors, are kept.
        """
        dims = range(ahead, x.dim())
        if self.format.granularity == "token":
            kept = x.dim() - 2
            return x.sum([d for d in dims if d != kept]).unsqueeze(-1)
        if self.format.granularity == "tensor" or self.axis is None:
            return x.sum(list(dims))
        axis = ahead + self.axis % (x.dim() - ahead)
        return x.sum([d for d in dims if d != axis], keepdim=True)

    def _mean(self, x: Tensor) -> Tensor:
        total = self._sum(x)
        return total.mul_(max(1, total.numel()) / max(1, x.numel()))

    def _follow(self, x: Tensor, grid: Grid) -> Grid:
        factors = torch.tensor(CANDIDATES, device=x.device)
        errors = []
        for some in factors.split(len(factors) if x.numel() <= TOGETHER else 1):
            ahead = grid.scale.reshape((1,) * (x.dim() - grid.scale.dim()) + grid.scale.shape)
            several = grid._replace(scale=ahead * some.reshape(-1, *[1] * x.dim()))
            total = self._sum(fake_quantize(x[None], several).sub_(x).square_(), ahead=1)
            errors.append(total.reshape(len(some), -1))
        best = factors[torch.cat(errors).argmin(0)]
        best = best.reshape(grid.scale.shape if best.numel() == grid.scale.numel() else ())
        return grid._replace(scale=grid.scale.lerp(grid.scale * best, FOLLOW).clamp(min=SMALLEST))

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of the error."""
        return self.variance.clamp(min=0).sqrt()

    @property
    def step(self) -> Tensor:
        """The quantizer's step size."""
        assert self.grid is not None
        return self.grid.scale

    def limits(self) -> tuple[Tensor, Tensor]:
        """The ends of the quantizer's range."""
        assert self.grid is not None
        return limits(self.grid)

    def state_dict(self) -> dict[str, Any]:
        grid = None if self.grid is None else [self.grid.scale, self.grid.zero_point]
        return {"grid": grid, "mean": self.mean, "variance": self.variance, "nonzero": self.nonzero}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        if state["grid"] is not None:
            scale, zero_point = (part.to(device) for part in state["grid"])
            self.grid = Grid(scale, zero_point, self.format.qmin, self.format.qmax, self.format.offset)
        self.mean, self.variance, self.nonzero = (
            state["mean"].to(device),
            state["variance"].to(device),
            state["nonzero"],
        )


def spread(count: int, values: int, most: int = SAMPLE) -> range:
    """Which of ``count`` rows of so many values are looked at: spread evenly, about ``most`` values in all."""
    rows = max(1, min(count, most // max(1, values)))
    stride = max(1, count // rows)
    return range(0, rows * stride, stride)


def sample_activation(x: Tensor, most: int = SAMPLE) -> Tensor:
    """Whole images spread over the batch, about ``most`` values in all."""
    places = spread(x.shape[0], x[0].numel(), most)
    return x.detach()[: places.stop : places.step]


def part_of_sample(x: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """What this process has of the values that :func:`sample_activation` takes of the whole batch, a vector.

    Args:
        x: the activations of this process's images.
        counts: how many images each process has.
    """
    if x.shape[0] % max(1, counts[rank]):  # the first dimension is not that of images
        return sample_activation(x, SAMPLE // len(counts)).float().flatten()
    rows = x.shape[0] // max(1, counts[rank])  # of an image: windows of an attention are rows of their own
    taken = spread(rows * sum(counts), x[0].numel())
    begin, end = (rows * sum(counts[:r]) for r in (rank, rank + 1))
    return x.detach()[[i - begin for i in taken if begin <= i < end]].float().flatten()


def gather_samples(parts: Sequence[Tensor], accelerator: Accelerator) -> list[Tensor]:
    """Of every sample the parts of all processes, joined; one exchange, whatever their number."""
    if accelerator.num_processes == 1 or not parts:
        return list(parts)
    own = torch.tensor([[len(part) for part in parts]], device=parts[0].device)
    sizes = accelerator.gather(own)
    joined = gather_rows(torch.cat(list(parts)), accelerator, sizes.sum(1).tolist())
    pieces = iter(joined.split(sizes.flatten().tolist()))
    by_process = [[next(pieces) for _ in parts] for _ in sizes]
    return [torch.cat(same) for same in zip(*by_process, strict=True)]
