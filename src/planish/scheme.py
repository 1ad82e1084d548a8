"""What is quantized and how, as pure data: `Format` for one kind of tensor, `Scheme` for a whole network."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from planish.errors import PlanishError

GRANULARITIES = ("tensor", "channel", "group", "token")
OBSERVERS = ("minmax", "percentile", "mse", "mse2.4")
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Format:
    """How one kind of tensor is put on a uniform grid.

    Attributes:
        bits: code width, 2 to 8.
        granularity: who shares a scale: the whole "tensor", each "channel", each "group" of `group_size` consecutive
            elements along the input dimension, or each "token" row (dimension -2, the same rows for every image).
        symmetric: True: zero point 0 and signed codes [-2^(b-1), 2^(b-1)-1]; False: affine, unsigned codes
            [0, 2^b-1] with an integer zero point.
        half_integer: symmetric grid without a zero level, x = (q + 1/2) * scale. At 2 bits this gives the four
            evenly spread levels -1.5, -0.5, 0.5, 1.5 in place of -2, -1, 0, 1.
        group_size: elements that share a scale when granularity is "group".
        observer: how the range is found: "minmax", "percentile", "mse" (least |error|^2) or "mse2.4" (|error|^2.4).

    Raises:
        PlanishError: a field is outside what is listed above.
    """

    bits: int
    granularity: str = "tensor"
    symmetric: bool = True
    half_integer: bool = False
    group_size: int = 32
    observer: str = "mse"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise PlanishError(f"bits is {self.bits!r}: a format has {MIN_BITS} to {MAX_BITS} bits, as a whole number.")
        if self.granularity not in GRANULARITIES:
            raise PlanishError(f"granularity is {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}.")
        if self.observer not in OBSERVERS:
            raise PlanishError(f"observer is {self.observer!r}: choose one of {', '.join(OBSERVERS)}.")
        if self.half_integer and not self.symmetric:
            raise PlanishError("half_integer needs symmetric=True: an affine grid always has a zero level.")
        if self.group_size < 1:
            raise PlanishError(f"group_size is {self.group_size}: a group has at least 1 element.")

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def offset(self) -> float:
        """What is added to a code before it is multiplied by the scale: 0.5 on the half-integer grid, else 0."""
        return 0.5 if self.half_integer else 0.0

    def at(self, bits: int) -> Format:
        """The same format at another width; a half-integer grid is kept only at 2 bits."""
        return replace(self, bits=bits, half_integer=self.half_integer and bits == 2)

    def describe(self) -> str:
        """A few words for a protocol card: "4 bits symmetric per channel, range by mse"."""
        shared = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        kind = "symmetric half-integer" if self.half_integer else "symmetric" if self.symmetric else "affine"
        return f"{self.bits} bits {kind} per {shared}, range by {self.observer}"


@dataclass(frozen=True)
class Scheme:
    """What is quantized in a network and how. Change a field with `dataclasses.replace`.

    Attributes:
        name: the short notation, such as "w4a4".
        weights: format of the weights.
        activations: format of layer inputs and attention operands; None leaves activations in float.
        edge_bits: width of the first and the last layer (weights and inputs); None: the same as the rest.
        heads: give the softmax output of each head a scale of its own, where activations have one for a tensor. What
            sums over heads comes later, so integer kernels can do it.
        overrides: products with widths of their own, as pairs of the product's exact name and a notation, such as
            ("head.linear", "w3a8") for a product with a weight ("w3": its input stays in float) or "a4" for one of two
            activations. They go before everything else, the bits of the first and last layer included.

    Raises:
        PlanishError: a field is outside what is listed above, or a product is overridden twice.
    """

    name: str
    weights: Format
    activations: Format | None = None
    edge_bits: int | None = 8
    overrides: tuple[tuple[str, str], ...] = ()
    heads: bool = False

    def __post_init__(self) -> None:
        bits = self.edge_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MAX_BITS):
            raise PlanishError(
                f"edge_bits is {bits!r}: give {MIN_BITS} to {MAX_BITS}, or None for the bits of the rest."
            )
        for product, notation in self.overrides:
            read_override(notation, product)
        names = [product for product, _ in self.overrides]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PlanishError(f"the overrides name {twice!r} more than once: give each product one notation.")

    def edge(self) -> Scheme:
        """The scheme of the first and last layer: the same formats at `edge_bits`."""
        if self.edge_bits is None:
            return self
        weights = self.weights.at(self.edge_bits)
        activations = None if self.activations is None else self.activations.at(self.edge_bits)
        return replace(self, name=_name(weights, activations), weights=weights, activations=activations)

    def describe(self) -> str:
        """One line for the protocol card."""
        activations = "float" if self.activations is None else self.activations.describe()
        if self.heads and self.activations is not None:
            activations += ", a scale for each head's softmax"
        edge = "as the rest" if self.edge_bits is None else f"{self.edge_bits} bits"
        line = f"{self.name}: weights {self.weights.describe()}; activations {activations}; first and last layer {edge}"
        alike: dict[str, list[str]] = {}
        for product, notation in self.overrides:
            alike.setdefault(notation, []).append(product)
        return "; but ".join([line, *(f"{notation} for {', '.join(names)}" for notation, names in alike.items())])

    def at(self, notation: str) -> Scheme:
        """The formats of a product that is overridden with `notation`: the same kinds of grid at its widths.

        A symmetric 2-bit grid of the weights is the half-integer one, as in `parse`, unless 2 is the scheme's own width
        and its grid is another.
        """
        weight_bits, activation_bits = read_override(notation)
        weights, activations = self.weights, None
        if weight_bits is not None and weight_bits != weights.bits:
            weights = replace(weights, bits=weight_bits, half_integer=weights.symmetric and weight_bits == 2)
        if activation_bits is not None:
            like = self.activations or Format(activation_bits, "tensor", symmetric=False)
            activations = like if like.bits == activation_bits else like.at(activation_bits)
        return replace(self, name=notation, weights=weights, activations=activations, overrides=())

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """Read "w4a4", "w4a8", "W2A2" or, for weights only, "w3"; a `Scheme` is returned as it is.

        Weights become symmetric per channel with MSE ranges (half-integer at 2 bits), activations affine per tensor
        with MSE ranges, the first and last layer 8 bits.

        Raises:
            PlanishError: the text is not in this notation or a width is not 2 to 8.
        """
        if isinstance(text, Scheme):
            return text
        match = re.fullmatch(r"w([2-8])(?:a([2-8]))?", text.strip(), re.IGNORECASE) if isinstance(text, str) else None
        if match is None:
            raise PlanishError(
                f"scheme {text!r} is not understood: write w4a4 or w4a8 (bits of weights and activations, "
                f"{MIN_BITS} to {MAX_BITS} each), or w3 for weights only."
            )
        bits = int(match[1])
        weights = Format(bits, "channel", symmetric=True, half_integer=bits == 2)
        activations = Format(int(match[2]), "tensor", symmetric=False) if match[2] else None
        return Scheme(_name(weights, activations), weights, activations)


def _name(weights: Format, activations: Format | None) -> str:
    return f"w{weights.bits}" + (f"a{activations.bits}" if activations else "")


def read_override(notation: str, product: str = "") -> tuple[int | None, int | None]:
    """Bits of weights and of activations in "w3a4", "w3" (activations in float) or "a4" (a product without a weight).

    Raises:
        PlanishError: the notation is not one of these; the sentence names `product`.
    """
    match = re.fullmatch(r"(?=.)(?:w([2-8]))?(?:a([2-8]))?", notation) if isinstance(notation, str) else None
    if match is None:
        raise PlanishError(
            f"override {notation!r}{f' of {product}' if product else ''} is not understood: write w3a4, w3 "
            f"(activations in float) or, for a product without a weight, a4, with {MIN_BITS} to {MAX_BITS} bits each."
        )
    return tuple(int(bits) if bits else None for bits in match.groups())  # type: ignore[return-value]
