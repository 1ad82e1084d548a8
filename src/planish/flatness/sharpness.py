"""Sharpness: how much the loss can rise within a ball around the weights, and within the box of their rounding.

Every function looks at the network as it is switched when it is called: the float network, unless
:meth:`~planish.flatness.subject.Subject.tapped` is open around it. Losses are mean cross-entropies in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planish.errors import PlanishError
from planish.flatness.perturbations import (
    Tensors,
    chosen,
    loss_gradients,
    shifted,
    standard_error,
    step_of,
    weights_of,
)
from planish.flatness.responses import NoisePoint, PathPoint, noise_response, rounding_path
from planish.flatness.subject import Batch, Subject


@dataclass(frozen=True)
class Sharpness:
    """By how much the loss rises at the worst point found within ``rho``; the standard error is over images."""

    rho: float
    increase: float
    error: float


@dataclass(frozen=True)
class SharpnessReport:
    """What :func:`sharpness` gathers; ``rounding_low_bit`` is the path of the weights on rounded activations."""

    rounding: list[PathPoint]
    rounding_low_bit: list[PathPoint]
    weight_noise: list[NoisePoint]
    activation_noise: list[NoisePoint]
    sam: Sharpness
    asam: Sharpness
    worst: Sharpness


def sharpness(
    subject: Subject,
    scheme: str,
    *,
    images: int | None = None,
    draws: int = 4,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    seed: int = 0,
) -> SharpnessReport:
    """All that this module and :mod:`~planish.flatness.responses` measure, for one scheme.

    The lists that need rounded activations are empty where the scheme leaves them in float.

    Args:
        images: how many of the subject's images are looked at; ``None``: all.
        draws: of the noise.
        rho, adaptive_rho: radius of SAM and of ASAM; the defaults are those of the papers for CIFAR-10.
    """
    rounds = bool(subject.grids(scheme, weights=False))
    return SharpnessReport(
        rounding=rounding_path(subject, scheme, images=images),
        rounding_low_bit=rounding_path(subject, scheme, images=images, rounded_activations=True) if rounds else [],
        weight_noise=noise_response(subject, scheme, draws=draws, images=images, seed=seed),
        activation_noise=noise_response(
            subject, scheme, draws=draws, where="activations", images=images, seed=seed
        ) if rounds else [],
        sam=sam_sharpness(subject, rho, images=images),
        asam=sam_sharpness(subject, adaptive_rho, adaptive=True, images=images),
        worst=worst_rounding(subject, scheme, images=images),
    )  # fmt: skip


def sam_sharpness(
    subject: Subject, rho: float = 0.05, adaptive: bool = False, images: int | None = None, steps: int = 1
) -> Sharpness:
    """max L(w + e) - L(w) over |e| <= rho, by gradient ascent (Foret et al. 2021, arXiv 2010.01412, equation 2).

    With ``adaptive=True`` the ball is |e / w| <= rho, elementwise (ASAM, Kwon et al. 2021, arXiv 2102.11600,
    with T_w = diag(|w|) and no constant added to it), which makes the measure invariant to scales that two layers can
    trade. All weights of matrix products move together; biases and norms stay.

    Args:
        steps: 1 is the first-order solution e = rho g / |g|; more: as many steps of length rho / steps along the
            gradient at the point reached, which stay within the ball.

    Raises:
        PlanishError: ``rho`` is not positive, or ``steps`` below 1.
    """
    if not rho > 0 or steps < 1:
        raise PlanishError(f"sharpness needs a radius above 0 and 1 step or more, got {rho} and {steps}")
    batches = chosen(subject, images)
    weights = weights_of(subject)
    shifts = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(steps):
        gradients = loss_gradients(subject, batches, shifts)
        moves = _ascent(weights, gradients, rho / steps, adaptive)
        shifts = {name: shift + moves[name] for name, shift in shifts.items()}
    return _rise(subject, batches, shifts, rho)


def _ascent(weights: Tensors, gradients: Tensors, length: float, adaptive: bool) -> Tensors:
    """``length`` g / |g|, or ``length`` T^2 g / |T g| with T = |w|; zero where the gradient vanishes."""
    scaled = {name: g * weights[name].abs() if adaptive else g for name, g in gradients.items()}
    norm = torch.stack([g.double().square().sum() for g in scaled.values()]).sum().sqrt()
    factor = float(length / norm) if norm > 0 else 0.0
    return {name: g * (weights[name].abs() * factor if adaptive else factor) for name, g in scaled.items()}


def worst_rounding(subject: Subject, scheme: str, rho: float = 0.5, images: int | None = None) -> Sharpness:
    """L(w + rho s sign(g)) - L(w): the worst corner, to first order, of the box that rounding can reach.

    s is the step of each weight that the scheme quantizes; rounding without clipping moves it by at most half a step,
    ``rho = 0.5``.

    Raises:
        PlanishError: ``rho`` is not positive.
    """
    if not rho > 0:
        raise PlanishError(f"the box of rounding needs a radius above 0 (in steps), got {rho}")
    batches, grids = chosen(subject, images), subject.grids(scheme, activations=False)
    shifts = {name: torch.zeros_like(weight) for name, weight in weights_of(subject, list(grids)).items()}
    gradients = loss_gradients(subject, batches, shifts)
    corner = {name: (rho * step_of(grids[name]) * g.sign()).to(g.dtype) for name, g in gradients.items()}
    return _rise(subject, batches, corner, rho)


def _rise(subject: Subject, batches: list[Batch], shifts: Tensors, rho: float) -> Sharpness:
    clean = subject.losses(batches).double()
    with shifted(subject, shifts):
        rise = subject.losses(batches).double() - clean
    return Sharpness(rho, rise.mean().item(), standard_error(rise))
