"""What to do next, in sentences: each from a measurement of what it would bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planish.flatness.perturbations import standard_error
from planish.flatness.subject import Batch, Subject

SPARED = "w8a8"  # what a product is lifted to
CLEAR = 2.0  # standard errors that a gain has to be above zero


@dataclass(frozen=True)
class Advice:
    """A sentence, and what it rests on.

    ``gain`` is in top-1 (a fraction) on the images looked at, ``gain_error`` its standard error over them, ``bytes``
    what the file grows by. All three are ``None`` for advice that is not about one product.
    """

    text: str
    product: str | None = None
    gain: float | None = None
    gain_error: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Spared:
    """A network at few bits with one product at 8: what that brings, and what it costs."""

    product: str
    gain: float
    gain_error: float
    loss: float  # nats that it saves
    bytes: float


def spare(subject: Subject, scheme: str, products: Sequence[str], batches: list[Batch] | None = None) -> list[Spared]:
    """Round everything by ``scheme`` but lift the sites of one product to 8 bits; compare with lifting none.

    A site that another product shares is lifted there, too. The standard error is that of the paired difference.
    """
    low: dict[str, Any] = subject.grids(scheme)
    high: dict[str, Any] = subject.grids(SPARED)
    labels = torch.cat([y for _, y in batches or subject.batches]).cpu()
    found = []
    with subject.tapped(low):
        before, loss_before = _right(subject, labels, batches)
        for product in products:
            sites = [s for p in subject.products if p.name == product for s in p.sites if s.name in low]
            with subject.tapped({site.name: high[site.name] for site in sites}):
                after, loss_after = _right(subject, labels, batches)
            difference = after - before
            error = standard_error(difference)
            grown = sum(
                torch.Size(s.shape).numel() * (high[s.name].format.bits - low[s.name].format.bits) / 8
                for s in sites
                if s.is_weight
            )
            saved = (loss_before - loss_after).mean().item()
            found.append(Spared(product, difference.mean().item(), error, saved, grown))
    return found


def _right(subject: Subject, labels: Tensor, batches: list[Batch] | None) -> tuple[Tensor, Tensor]:
    """1 where the network is right and 0 where not, and the cross-entropy, image by image."""
    logits = subject.logits(batches).double()
    return (logits.argmax(-1) == labels).double(), torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def about_products(spared: Sequence[Spared], images: int) -> list[Advice]:
    """A sentence for each product at 8 bits that brings more than its scatter, best first; else one that says so."""
    clear = [one for one in spared if one.gain > CLEAR * one.gain_error]
    if not clear and spared:
        tried = ", ".join(f"{one.product} ({100 * one.gain:+.1f})" for one in spared)
        scatter = 100 * max(one.gain_error for one in spared)
        return [
            Advice(
                f"No single product is worth 8 bits: lifting those that lose most changes top-1 on the {images} images "
                f"looked at by no more than twice its scatter of {scatter:.1f} points: {tried}."
            )
        ]
    advice = []
    for one in sorted(clear, key=lambda s: s.gain, reverse=True):
        cost = f"and {size(one.bytes)}" if one.bytes else "and no bytes of the file"
        text = (
            f"{one.product}: keep it at 8 bits for {100 * one.gain:+.1f} points {cost} (top-1 on the {images} images "
            f"looked at, ± {100 * one.gain_error:.1f})."
        )
        advice.append(Advice(text, one.product, one.gain, one.gain_error, one.bytes))
    return advice


def about_parts(scheme: str, weights: float, activations: float, interaction: float) -> Advice:
    """Which half of the scheme loses more, and what helps there. Arguments: the parts of the loss increase in nats."""
    whole = weights + activations + interaction
    shares = f"{weights:.3g} of {whole:.3g} nats by the weights alone, {activations:.3g} by the activations alone"
    if not whole > 0:
        return Advice(f"At {scheme} rounding does not raise the loss on the images looked at ({whole:+.3g} nats).")
    if interaction > max(weights, activations):
        return Advice(
            f"At {scheme} the errors of weights and activations do most damage together ({shares}): raise the bits "
            f"of either side, or flatten the network under both."
        )
    if weights > 2 * activations:
        return Advice(
            f"At {scheme} the weights lose most ({shares}): learn their rounding (--method fast, best-cnn or "
            f"best-vit), or flatten the network first (planish flatten)."
        )
    if activations > 2 * weights:
        return Advice(
            f"At {scheme} the activations lose most ({shares}): give them more bits than the weights, or learn their "
            f"ranges (--method qdrop)."
        )
    return Advice(f"At {scheme} weights and activations lose about the same ({shares}).")


def about_bits(float_top1: float, top1: Sequence[tuple[str, float]], allowed: float = 0.01) -> Advice:
    """How low this network goes by rounding alone. ``top1``: measured, by scheme, from most to fewest bits."""
    losing = [float_top1 - value > allowed for _, value in top1]
    first = losing.index(True) if True in losing else len(top1)
    kept, lost = [scheme for scheme, _ in top1[:first]], top1[first:]
    points = f"{100 * allowed:.0f} point{'' if round(100 * allowed) == 1 else 's'}"
    good = f"Rounding alone keeps {kept[-1]} within {points} of float" if kept else f"No scheme stays within {points}"
    if not lost:
        return Advice(f"{good}: nothing else is needed there.")
    scheme, value = lost[0]
    return Advice(
        f"{good}; {scheme} loses {100 * (float_top1 - value):.1f} points by rounding alone, where a better method, "
        f"flattening or training is worth its time."
    )


def about_others(scheme: str, points: Mapping[str, tuple[float, float]]) -> list[Advice]:
    """How networks compare at one scheme. ``points``: top-1 in float and by rounding, by name; the first is the rest's
    rival."""
    if not points:
        return []
    (first, (float_top1, top1)), *others = points.items()
    return [
        Advice(
            f"{name} keeps {100 * kept:.1f} % top-1 at {scheme} ({100 * full:.1f} % in float), where {first} keeps "
            f"{100 * top1:.1f} % ({100 * float_top1:.1f} %)."
        )
        for name, (full, kept) in others
    ]


def size(count: float) -> str:
    """``840 bytes``, ``12 kB``, ``3.1 MB``."""
    if count < 1000:
        return f"{count:.0f} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"
