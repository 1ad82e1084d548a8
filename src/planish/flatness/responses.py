"""How the loss answers to what quantization does: the way to the rounded weights, and noise of the size of a step.

Both look at the network as it is switched when they are called: the float network, unless
:meth:`~planish.flatness.subject.Subject.tapped` is open around them. Losses are mean cross-entropies in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from planish.data.randomness import generator_for
from planish.errors import PlanishError
from planish.flatness.perturbations import (
    Along,
    Noise,
    chosen,
    gaussians,
    mean_loss,
    rms,
    shifted,
    standard_error,
    step_of,
    weights_of,
)
from planish.flatness.subject import Batch, Subject

TS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SIGMAS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class PathPoint:
    """The network at w + t (Q(w) - w): mean loss, its standard error over images, share of images that are right."""

    t: float
    loss: float
    error: float
    top1: float


@dataclass(frozen=True)
class NoisePoint:
    """Mean loss under noise of ``sigma`` units, and its standard error over draws (NaN for one draw)."""

    sigma: float
    loss: float
    error: float


def rounding_path(
    subject: Subject,
    scheme: str,
    ts: Sequence[float] = TS,
    images: int | None = None,
    *,
    rounded_activations: bool = False,
) -> list[PathPoint]:
    """The loss on the straight line from the weights to their roundings, and beyond.

    Args:
        ts: points of the line: 0 is the float network, 1 the one with rounded weights.
        rounded_activations: round the activations, too, fully at every point.
    """
    batches = chosen(subject, images)
    weights = subject.grids(scheme, activations=False)
    activations = subject.grids(scheme, weights=False) if rounded_activations else {}
    with subject.tapped(activations):
        return [_path_point(subject, batches, weights, float(t)) for t in ts]


def _path_point(subject: Subject, batches: list[Batch], grids: Mapping[str, nn.Module], t: float) -> PathPoint:
    labels = torch.cat([y for _, y in batches]).cpu()
    with subject.tapped({name: Along(grid, t) for name, grid in grids.items()}):
        logits = subject.logits(batches)
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    top1 = (logits.argmax(-1) == labels).double().mean().item()
    return PathPoint(t, losses.mean().item(), standard_error(losses), top1)


def noise_response(
    subject: Subject,
    scheme: str,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 4,
    where: str = "weights",
    images: int | None = None,
    seed: int = 0,
    *,
    relative_to: str = "step",
) -> list[NoisePoint]:
    """L(w + sigma u e) or L(x + sigma u e) with standard Gaussian e, at all sites that the scheme quantizes.

    The same draws serve every sigma, so the curve is smooth in sigma.

    Args:
        sigmas: standard deviations in units of u. Rounding without clipping has 1/sqrt(12) = 0.289 steps.
        draws: of the noise on the whole set of images.
        where: "weights" or "activations".
        relative_to: u is the "step" of the scheme's grid (of each channel where it has one), or the "rms" of the
            weight, or of the activation in a batch.
        seed: for activations, the result depends on the batches, too.

    Raises:
        PlanishError: an unknown word, no draw, a negative sigma, or a scheme that quantizes nothing there.
    """
    if where not in ("weights", "activations") or relative_to not in ("step", "rms"):
        raise PlanishError(
            f"noise on {where!r} relative to {relative_to!r} is not known: choose weights or activations, step or rms"
        )
    if draws < 1 or any(not sigma >= 0 for sigma in sigmas):
        raise PlanishError(f"noise needs 1 draw or more and sigmas of 0 or more, got {draws} and {list(sigmas)}")
    grids = subject.grids(scheme, weights=where == "weights", activations=where == "activations")
    if not grids:
        raise PlanishError(f"scheme {scheme} quantizes no {where}: there is no step to measure noise in")
    batches = chosen(subject, images)
    respond = _weight_noise if where == "weights" else _activation_noise
    losses = respond(subject, grids, batches, sigmas, draws, seed, relative_to == "rms")
    columns = torch.tensor(losses, dtype=torch.float64).unbind(1)
    return [NoisePoint(float(s), x.mean().item(), standard_error(x)) for s, x in zip(sigmas, columns, strict=True)]


def _weight_noise(
    subject: Subject, grids: Mapping[str, nn.Module], batches: list[Batch], sigmas: Sequence[float], draws: int,
    seed: int, relative_to_rms: bool,
) -> list[list[float]]:  # fmt: skip
    weights = weights_of(subject, list(grids))
    units = {name: rms(weights[name]) if relative_to_rms else step_of(grid) for name, grid in grids.items()}
    losses: list[list[float]] = []
    for draw in range(draws):
        noise = {name: units[name] * e for name, e in gaussians(weights, seed, draw).items()}
        losses.append([])
        for sigma in sigmas:
            with shifted(subject, {name: (sigma * e).to(weights[name].dtype) for name, e in noise.items()}):
                losses[-1].append(mean_loss(subject, batches))
    return losses


def _activation_noise(
    subject: Subject, grids: Mapping[str, nn.Module], batches: list[Batch], sigmas: Sequence[float], draws: int,
    seed: int, relative_to_rms: bool,
) -> list[list[float]]:  # fmt: skip
    def loss(draw: int, sigma: float) -> float:
        taps = {
            name: Noise(sigma, None if relative_to_rms else step_of(grid), generator_for(seed, draw, place))
            for place, (name, grid) in enumerate(grids.items())
        }
        with subject.tapped(taps):
            return mean_loss(subject, batches)

    return [[loss(draw, sigma) for sigma in sigmas] for draw in range(draws)]
