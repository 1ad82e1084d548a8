"""The loss around a network along filter-normalized random directions (Li et al. 2018, arXiv 1712.09913, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.errors import PlanishError
from planish.flatness.perturbations import Tensors, chosen, gaussians, mean_loss, shifted, standard_error, weights_of
from planish.flatness.subject import Subject

TS = tuple(round(-1 + 0.2 * i, 1) for i in range(11))


@dataclass(frozen=True)
class LinePoint:
    """Mean loss at w + t d over the directions d drawn, and its standard error over them (NaN for one)."""

    t: float
    loss: float
    error: float


@dataclass(frozen=True)
class Plane:
    """``loss[i][j]`` is the mean loss at w + a[i] d + b[j] d' for two directions d and d'."""

    a: list[float]
    b: list[float]
    loss: list[list[float]]


def filter_normalized(direction: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """``direction`` with each filter brought to the norm of the same filter of the weight; both have one shape.

    Args:
        axis: output channels, whose slices are the filters; ``None``: the whole tensor is one filter.
    """
    rest = [dim for dim in range(weight.dim()) if axis is None or dim != axis % weight.dim()]
    wanted = torch.linalg.vector_norm(weight, dim=rest, keepdim=True) if rest else weight.abs()
    drawn = torch.linalg.vector_norm(direction, dim=rest, keepdim=True) if rest else direction.abs()
    return direction * (wanted / drawn.clamp(min=torch.finfo(drawn.dtype).tiny))


def directions(subject: Subject, seed: int, draw: int) -> Tensors:
    """A filter-normalized Gaussian for the weights of matrix products; biases and norms do not move.

    The Gaussian depends on (seed, draw) and the shapes alone, so two networks of one architecture are looked at along
    the same direction, each in units of its own filters.
    """
    weights = weights_of(subject)
    axes = {site.name: site.channel_axis for site in subject.sites}
    drawn = gaussians(weights, seed, draw)
    return {name: filter_normalized(drawn[name], weight, axes[name]) for name, weight in weights.items()}


def landscape_line(
    subject: Subject, ts: Sequence[float] = TS, draws: int = 4, images: int | None = None, seed: int = 0
) -> list[LinePoint]:
    """The loss at w + t d, averaged over ``draws`` directions d; at t = 1 each filter has moved by its own norm.

    Raises:
        PlanishError: ``draws`` is below 1.
    """
    if draws < 1:
        raise PlanishError(f"a line through the landscape needs 1 direction or more, got {draws}")
    batches = chosen(subject, images)
    losses = torch.empty(draws, len(ts), dtype=torch.float64)
    for draw in range(draws):
        direction = directions(subject, seed, draw)
        for i, t in enumerate(ts):
            with shifted(subject, {name: t * d for name, d in direction.items()}):
                losses[draw, i] = mean_loss(subject, batches)
    return [LinePoint(float(t), losses[:, i].mean().item(), standard_error(losses[:, i])) for i, t in enumerate(ts)]


def landscape_plane(
    subject: Subject, points: int = 9, span: float = 1.0, images: int | None = None, seed: int = 0
) -> Plane:
    """The loss on ``points`` x ``points`` places of the plane through w and two directions, from -span to span.

    The directions are the first two of :func:`landscape_line` with the same seed.

    Raises:
        PlanishError: fewer than 2 points, or a span that is not positive.
    """
    if points < 2 or not span > 0:
        raise PlanishError(f"a plane needs 2 points a side or more and a span above 0, got {points} and {span}")
    batches = chosen(subject, images)
    first, second = (directions(subject, seed, draw) for draw in (0, 1))
    places = [span * (2 * i / (points - 1) - 1) for i in range(points)]

    def loss(a: float, b: float) -> float:
        with shifted(subject, {name: a * d + b * second[name] for name, d in first.items()}):
            return mean_loss(subject, batches)

    return Plane(places, list(places), [[loss(a, b) for b in places] for a in places])
