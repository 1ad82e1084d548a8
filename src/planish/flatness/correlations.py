"""Whether quantization errors are independent of each other: of weights and activations, of channels, of layers.

Every correlation stands beside its chance level: the mean absolute value that independent errors would show on as many
samples. It is never 0, and with few channels or images it is large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planish.flatness.contributions import layer_contributions
from planish.flatness.subject import Batch, Subject
from planish.network.products import Call, ProductMode
from planish.network.sites import Product

DRAWS = 64  # of random signs, for a chance level
CHANNELS = 256  # of an activation at most, taken evenly


@dataclass(frozen=True)
class Correlation:
    """A correlation, and the mean absolute value of it that chance alone gives; NaN where there is nothing to pair."""

    value: float
    chance: float


@dataclass(frozen=True)
class ProductCorrelation:
    """The correlations inside one product of a weight and an activation; ``weight_activation`` keeps its sign."""

    product: str
    weight_activation: Correlation
    channels: Correlation


@dataclass(frozen=True)
class Correlations:
    """Mean absolute correlations of quantization errors, each beside its chance level.

    Attributes:
        weight_activation: for a product y = W x the correlation, over its output elements, of the two errors that
            rounding puts there, (Q(W) - W) x and W (Q(x) - x). About 0, not about the means: it is what the cross term
            in the mean square of their sum comes from. Chance: the same with a random sign for each output channel of
            the weight's error. Mean over the products.
        channels: between the errors of two input channels of a product, over images and positions, averaged over all
            pairs. Chance: sqrt(2 / (pi n)) for n independent samples; positions of one image are not quite independent,
            so a little more than that is no sign of anything. Mean over the products.
        layers: between two layers, over images, of what the rounding of their activations adds to the loss of the image
            to first order, grad . e; averaged over all pairs. It is this projection that decides whether the errors of
            layers cancel or add up in the loss. Chance: the same with a random sign for each layer and image, which
            keeps that some images have large gradients in all layers.
        products: the first two for each product.
    """

    weight_activation: Correlation
    channels: Correlation
    layers: Correlation
    products: list[ProductCorrelation]


def correlate(
    subject: Subject, grids: Mapping[str, nn.Module], batches: Sequence[Batch], *, seed: int = 0
) -> Correlations:
    """Measure all correlations of the errors that ``grids`` (by the name of the site) make in the float network."""
    generator = torch.Generator().manual_seed(seed)
    watched = _Products(subject.products, grids)
    with subject.tapped(watched.taps()), watched:
        subject.logits(batches)
    products = [
        ProductCorrelation(name, pair.correlation(generator), watched.channels[name].correlation())
        for name, pair in watched.pairs.items()
    ]
    return Correlations(
        _mean([p.weight_activation for p in products]),
        _mean([p.channels for p in products]),
        layer_correlation(layer_contributions(subject, grids, batches), generator),
        products,
    )


def _mean(found: Sequence[Correlation]) -> Correlation:
    defined = [c for c in found if not math.isnan(c.value)]
    if not defined:
        return Correlation(math.nan, math.nan)
    n = len(defined)
    return Correlation(sum(abs(c.value) for c in defined) / n, sum(c.chance for c in defined) / n)


def random_signs(*shape: int, generator: torch.Generator) -> Tensor:
    """-1 and 1 with equal chance, float64, on the CPU."""
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def layer_correlation(contributions: Tensor, generator: torch.Generator) -> Correlation:
    """Mean absolute correlation between the rows of (layers, images); rows that do not vary are left out."""
    rows = contributions[(contributions != contributions[:, :1]).any(-1)]
    if len(rows) < 2:
        return Correlation(math.nan, math.nan)
    signs = random_signs(DRAWS, *rows.shape, generator=generator)
    chance = sum(_off_diagonal(torch.corrcoef(rows * sign)) for sign in signs) / DRAWS
    return Correlation(_off_diagonal(torch.corrcoef(rows)), chance)


def _off_diagonal(matrix: Tensor) -> float:
    """Mean absolute value of what is off the diagonal of a square matrix."""
    n = len(matrix)
    return float((matrix.abs().sum() - matrix.diagonal().abs().sum()) / (n * (n - 1)))


class _Pair:
    """Sums of squares and products of the two errors in the output of a product."""

    def __init__(self) -> None:
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.shared = torch.zeros(1, dtype=torch.float64)  # by output channel

    def add(self, of_weight: Tensor, of_input: Tensor, axis: int) -> None:
        w, x = (t.movedim(axis, -1).reshape(-1, t.shape[axis]).double() for t in (of_weight, of_input))
        self.squares = self.squares + torch.stack([w.square().sum(), x.square().sum()]).cpu()
        self.shared = self.shared + (w * x).sum(0).cpu()

    def correlation(self, generator: torch.Generator) -> Correlation:
        scale = float(self.squares.prod().sqrt())
        if not scale > 0:
            return Correlation(math.nan, math.nan)
        signs = random_signs(DRAWS, len(self.shared), generator=generator)
        return Correlation(float(self.shared.sum()) / scale, float((signs @ self.shared).abs().mean()) / scale)


class _Channels:
    """Streamed covariance between the channels of an error."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, error: Tensor, axis: int) -> None:
        rows = error.movedim(axis, -1).flatten(0, -2)
        rows = rows[:, :: -(-rows.shape[1] // CHANNELS)]
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0, dtype=torch.float64).cpu()
        self.products = self.products + (rows.T @ rows).double().cpu()

    def correlation(self) -> Correlation:
        mean = self.sum / max(1, self.count)
        covariance = self.products / max(1, self.count) - mean.outer(mean) if mean.ndim else torch.zeros(0, 0)
        variance = covariance.diagonal()
        vary = variance > 1e-6 * variance.max() if len(variance) else variance.bool()
        if int(vary.sum()) < 2:
            return Correlation(math.nan, math.nan)
        deviation = variance[vary].sqrt()
        matrix = covariance[vary][:, vary] / deviation.outer(deviation)
        return Correlation(_off_diagonal(matrix), math.sqrt(2 / (math.pi * self.count)))


class _Tell(nn.Module):
    """Says which tensor passed which site."""

    def __init__(self, site: str, told: dict[str, Tensor]) -> None:
        super().__init__()
        self.site, self.told = site, told

    def forward(self, x: Tensor) -> Tensor:
        self.told.pop(self.site, None)
        self.told[self.site] = x  # last in the order of the dictionary
        return x


class _Products(ProductMode):
    """Sees every product of a quantized weight and a quantized activation, and computes it with each error alone."""

    def __init__(self, products: Sequence[Product], grids: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.grids = grids
        self.weights: dict[str, Tensor] = {}  # what each weight's tap saw last
        self.inputs: dict[str, Tensor] = {}
        self.by_sites: dict[tuple[str, str], str] = {}
        for product in products:
            inputs = [site.name for site in product.sites if site.role == "input" and site.name in grids]
            if product.weight is not None and product.weight.name in grids and inputs:
                self.by_sites[product.weight.name, inputs[0]] = product.name
        self.pairs = {name: _Pair() for name in self.by_sites.values()}
        self.channels = {name: _Channels() for name in self.by_sites.values()}

    def taps(self) -> dict[str, nn.Module]:
        weights = {weight: _Tell(weight, self.weights) for weight, _ in self.by_sites}
        return {**weights, **{activation: _Tell(activation, self.inputs) for _, activation in self.by_sites}}

    def fused(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value  # no weight in it

    def product(self, call: Call) -> Tensor:
        out: Tensor = call.compute(call.operands)
        weight = next(((n, s) for n, t in call.operands.items() for s, seen in self.weights.items() if seen is t), None)
        if weight is None or not self.inputs:
            return out
        of_weight, latest = weight[0], next(reversed(self.inputs))
        name = self.by_sites.get((weight[1], latest))
        if name is not None:
            of_input = next(operand for operand in call.operands if operand != of_weight)
            self._take(name, call, out, (of_weight, self.grids[weight[1]]), (of_input, self.grids[latest]))
        return out

    def _take(
        self, name: str, call: Call, out: Tensor, weight: tuple[str, nn.Module], activation: tuple[str, nn.Module]
    ) -> None:
        operator = call.signature.operator
        spatial = int(operator[-2]) if operator.startswith("conv") and operator[-2].isdigit() else 0
        axis = -1 - spatial  # of the channels, before the axes of an image
        of_weight, of_input = (
            call.compute({**call.operands, operand: quantizer(call.operands[operand])}) - out
            for operand, quantizer in (weight, activation)
        )
        self.pairs[name].add(of_weight, of_input, axis)
        x = call.operands[activation[0]]
        self.channels[name].add(activation[1](x) - x, axis)
