"""Ways to push a network off its weights and activations, as taps and as shifts of the weights by the name of the site.

Nothing here edits a parameter: a shift is added by a tap while a measurement runs. Random numbers are drawn on the CPU,
so that a measurement is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.data.randomness import generator_for
from planish.errors import PlanishError
from planish.flatness.subject import Batch, Subject
from planish.network.batches import call_model, first_image, logits_of
from planish.ptq.sensitivity import every_nth

Tensors = dict[str, Tensor]  # by the name of the site


class Along(nn.Module):
    """x + t (Q(x) - x): on the way from a tensor to its rounding Q(x), exact at t = 0 and t = 1, and beyond."""

    def __init__(self, quantizer: nn.Module, t: float) -> None:
        super().__init__()
        self.quantizer, self.t = quantizer, t

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.quantizer(x), self.t)


class Shift(nn.Module):
    """x + shift, for a weight."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Noise(nn.Module):
    """x + sigma u e with fresh standard Gaussian e at every call, for an activation.

    Args:
        sigma: standard deviation in units of u.
        unit: u, which broadcasts against x; ``None``: the root mean square of the x that passes.
        generator: on the CPU.
    """

    def __init__(self, sigma: float, unit: Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        self.sigma, self.unit, self.generator = sigma, unit, generator

    def forward(self, x: Tensor) -> Tensor:
        unit = rms(x) if self.unit is None else self.unit
        noise = torch.randn(x.shape, generator=self.generator).to(x.device)
        return x + (self.sigma * unit * noise).to(x.dtype)


class _Recorder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        return x


def rms(x: Tensor) -> Tensor:
    """Root mean square of all elements, a float32 scalar."""
    return x.detach().float().square().mean().sqrt()


def step_of(quantizer: nn.Module) -> Tensor:
    """Distance of neighbouring levels of a uniform grid; it broadcasts against the tensor of its site."""
    return quantizer.grid.scale  # type: ignore[union-attr,return-value]


def chosen(subject: Subject, images: int | None) -> list[Batch]:
    """At most ``images`` of the subject's images, taken evenly from all batches; ``None``: all.

    Raises:
        PlanishError: ``images`` is below 1.
    """
    if images is None:
        return subject.batches
    if images < 1:
        raise PlanishError(f"{images} images are too few to look at a network on: give 1 or more, or None for all")
    return every_nth(subject.batches, images)


def weights_of(subject: Subject, names: Sequence[str] | None = None) -> Tensors:
    """The weights that enter matrix products, as they enter them (computed ones, too), detached.

    Args:
        names: of sites; default: every site of a weight, in the order of execution.
    """
    names = [site.name for site in subject.sites if site.is_weight] if names is None else names
    recorders = {name: _Recorder() for name in names}
    inputs, labels = subject.batches[0]
    with subject.tapped(recorders):
        subject.logits([(first_image(inputs), labels[:1])])
    return {name: recorder.seen for name, recorder in recorders.items()}


def gaussians(weights: Tensors, seed: int, draw: int) -> Tensors:
    """A standard Gaussian of the shape of each weight, a function of (seed, draw, place in the order)."""
    return {
        name: torch.randn(weight.shape, generator=generator_for(seed, draw, place)).to(weight)
        for place, (name, weight) in enumerate(weights.items())
    }


@contextmanager
def shifted(subject: Subject, shifts: Mapping[str, Tensor]) -> Iterator[None]:
    """While this is open, the weights of the network are w + shift."""
    with subject.tapped({name: Shift(shift) for name, shift in shifts.items()}):
        yield


def mean_loss(subject: Subject, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy in nats under the taps that are switched in."""
    return subject.losses(batches).double().mean().item()


def loss_gradients(subject: Subject, batches: Sequence[Batch], shifts: Tensors) -> Tensors:
    """Gradient of the mean cross-entropy with respect to the weights, at w + shift; one backward pass a batch."""
    taps = {name: Shift(shift.detach().clone().requires_grad_()) for name, shift in shifts.items()}
    variables = [tap.shift for tap in taps.values()]
    sums = [torch.zeros_like(shift) for shift in shifts.values()]
    with subject.tapped(taps), torch.enable_grad():
        for inputs, labels in batches:
            loss = F.cross_entropy(logits_of(call_model(subject.model, inputs)).float(), labels, reduction="sum")
            for total, gradient in zip(sums, torch.autograd.grad(loss, variables, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
    count = sum(len(labels) for _, labels in batches)
    return {name: total / count for name, total in zip(shifts, sums, strict=True)}


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
