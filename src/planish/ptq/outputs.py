"""The outputs of layers in the quantized and in the float network, channel by channel, and how they are changed.

What is changed costs nothing when the network runs: a factor of an output channel goes into the scale of the weight's
grid, so the integers stay, and a shift goes into the bias.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.functional import dequantize, quantize
from planish.network import detach
from planish.network.batches import call_model
from planish.network.folding import same_outputs
from planish.network.taps import taps_of
from planish.ptq.layers import LayerCall, layer_weights
from planish.ptq.passes import Calibration, run_logits
from planish.ptq.walk import visit_layers
from planish.quantizers import UniformQuantizer

_TRANSPOSED = nn.modules.conv._ConvTransposeNd


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution whose bias is its own; ``tap`` if a factor of its outputs can go into the grid
    of its weight."""

    path: str
    module: nn.Module
    tap: UniformQuantizer | None


class KeepFloat:
    """Keep a copy of the network as it is now, in float, for the passes that compare layers with it.

    The passes that change weights (``GPTQ``, ``RidgeCorrection``, ``Reconstruct``, ``TuneNorms``) do so themselves, if
    none before them did. In a list it is needed only before passes of one's own that change them, and after those that
    change the float network (``FoldBatchNorm``, ``Rotate``, ...), which let go of what was kept.
    """

    name = "keep-float"

    def __call__(self, calibration: Calibration) -> None:
        calibration.float_twin = _without_taps(calibration.model)


def keep_float(calibration: Calibration) -> nn.Module:
    """The float network that passes compare with: the one that was kept, or else the network as it is now."""
    if calibration.float_twin is None:
        calibration.float_twin = _without_taps(calibration.model)
    return calibration.float_twin


def float_twin(calibration: Calibration) -> nn.Module:
    """The float network with the layers of ``calibration.model``, made from its weights if those are still in float.

    Raises:
        PlanishError: an earlier pass has changed the weights and no ``KeepFloat`` came before it.
    """
    if calibration.float_twin is None:
        twin = _without_taps(calibration.model)
        if not same_outputs(run_logits(twin, calibration.batches), calibration.reference):
            raise PlanishError(
                "the outputs of layers are to be compared with those of the float network, but earlier passes have "
                "changed its weights: put KeepFloat() into the list where the network is the one to compare with"
            )
        calibration.float_twin = twin
    return calibration.float_twin


def _without_taps(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    detach(twin)
    return twin


def count_holders(model: nn.Module) -> Counter[int]:
    """How many modules hold a parameter as their own, by its id: more than one where it is shared."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)


def layers_of(calibration: Calibration) -> list[Layer]:
    """The quantized layers in the order of execution, those in which a module multiplies with its own weight."""
    model, plan = calibration.model, calibration.assignment
    taps = dict(taps_of(model))
    holders = count_holders(model)
    quantized = {site.name for site, _ in plan.quantized()}
    layers = []
    for product in plan.products:
        weight, module = product.weight, model.get_submodule(product.module)
        if weight is None or not weight.parameter or weight.owner != product.module or weight.slot != "weight":
            continue
        bias = module._parameters.get("bias")
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or (bias is not None and holders[id(bias)] > 1):
            continue
        if quantized.isdisjoint(site.name for site in product.sites):
            continue
        own = holders[id(module._parameters["weight"])] == 1
        layers.append(Layer(product.module, module, _scalable(module, taps.get(weight.name)) if own else None))
    return layers


def _scalable(module: nn.Module, tap: nn.Module | None) -> UniformQuantizer | None:
    """The tap, if its grid has a scale of its own for each output channel."""
    if type(tap) is not UniformQuantizer or not tap.fitted or tap.format.granularity not in ("channel", "group"):
        return None
    shared = isinstance(module, _TRANSPOSED) and module.groups > 1  # by the same channel of all groups
    return None if shared else tap


@torch.no_grad()
def change_outputs(layer: Layer, factor: Tensor | None, shift: Tensor) -> None:
    """Make the layer put out ``factor * y + shift`` in place of ``y``; factor (C,) positive, shift (C,).

    The weight is set to the points of its grid, and both are multiplied by the factor: the integers stay.
    """
    module = layer.module
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if factor is not None:
        assert layer.tap is not None
        grid = layer.tap.grid
        axis = 1 if isinstance(module, _TRANSPOSED) else 0
        by = factor.float().view([-1 if dim == axis else 1 for dim in range(weight.dim())])
        codes = quantize(weight, grid)
        layer.tap.grid = grid._replace(scale=grid.scale * by)
        weight.detach().copy_(dequantize(codes, layer.tap.grid))
        if bias is not None:
            bias.detach().mul_(factor.to(bias.dtype))
    shift = shift.to(weight.dtype)
    if bias is None:
        module._parameters["bias"] = nn.Parameter(shift.clone(), requires_grad=False)
    else:
        bias.detach().add_(shift)


@dataclass
class Moments:
    """Count, sum and sum of squares of each output channel, (C,) in double precision, about a fixed origin."""

    count: int = 0
    origin: Tensor | None = None
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    calls: int = 0

    def add(self, module: nn.Module, output: Tensor) -> None:
        values = by_channel(module, output).double()
        if self.origin is None:
            self.origin = values.mean(1)  # keeps the sum of squares from cancelling
        values = values - self.origin[:, None]
        self.count += values.shape[1]
        self.calls += 1
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    @property
    def mean(self) -> Tensor:
        assert self.origin is not None
        return self.origin + self.total / self.count

    @property
    def variance(self) -> Tensor:
        assert isinstance(self.squares, Tensor)
        assert isinstance(self.total, Tensor)
        return (self.squares / self.count - (self.total / self.count).square()).clamp(min=0)


def _behind(module: nn.Module) -> int:
    """Dimensions behind that of the channels in the output of a linear layer (..., C) or a convolution (B, C, ...)."""
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]


def by_channel(module: nn.Module, output: Tensor) -> Tensor:
    """The output of the layer as (C, values)."""
    return output.detach().movedim(-1 - _behind(module), 0).flatten(1)


def along_channels(module: nn.Module, values: Tensor) -> Tensor:
    """One value for each channel, (C,), so that they broadcast against the output of the layer."""
    return values.view(-1, *[1] * _behind(module))


class _Enough(Exception):
    """The layer that was asked for has run; the rest of the network need not."""


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def output_moments(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Any], stop: bool = False
) -> dict[str, Moments]:
    """Moments of the outputs of the layers at ``paths`` over all batches; a layer that did not run is left out.

    Args:
        stop: end each forward pass as soon as the first of the layers has run.
    """
    names = {id(model.get_submodule(path)): path for path in paths}
    found: dict[str, Moments] = {}

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.setdefault(names[id(module)], Moments()).add(module, output)
        if stop:
            raise _Enough

    model.eval()
    with _hooked([model.get_submodule(path) for path in paths], hook):
        for batch in batches:
            with suppress(_Enough):
                call_model(model, batch)
    return found


Change = Callable[[Layer, Moments, Moments], None]


@torch.no_grad()
def change_layers(calibration: Calibration, change: Change, *, memory: float = 4.0) -> int:
    """Hand out the layers in the order of execution, each with the moments of its outputs in float and as they are now.

    "Now" is in the network with the layers before it changed already. Every batch is taken from block to block
    (``ptq/walk.py``); where a layer runs several times in a forward pass, or the walk cannot halt at one, the network
    is run anew up to each layer instead.

    Args:
        change: called with the layer and both moments; what it does to the layer, the next ones see.
        memory: gigabytes of outputs of blocks, for all images, that are held in memory; beyond it, in temporary files.

    Returns:
        How many layers ran and were handed out.

    Raises:
        PlanishError: as :func:`float_twin`.
    """
    layers, model, batches = layers_of(calibration), calibration.model, calibration.batches
    if not layers:
        return 0
    exact = output_moments(float_twin(calibration), [layer.path for layer in layers], batches)
    layers = [layer for layer in layers if layer.path in exact]
    once = all(exact[layer.path].calls == len(batches) for layer in layers)
    places = _halts(calibration, layers) if once else None
    if places is None:
        for layer in layers:
            stop = exact[layer.path].calls == len(batches)
            change(layer, exact[layer.path], output_moments(model, [layer.path], batches, stop)[layer.path])
        return len(layers)

    def decide(site: str, calls: Iterable[tuple[LayerCall, ...]]) -> None:
        layer, now = places[site], Moments()
        for (call,) in calls:
            now.add(layer.module, call.output())
        change(layer, exact[layer.path], now)

    visit_layers([model], calibration.assignment.products, batches, places, decide, memory=memory, rounded=True)
    return len(layers)


def _halts(calibration: Calibration, layers: Sequence[Layer]) -> dict[str, Layer] | None:
    """The layers by the sites of their weights; ``None`` if a walk cannot halt at each of them."""
    by_module = {(site.owner, site.slot): name for name, site in layer_weights(calibration.assignment).items()}
    places = {by_module.get((layer.path, "weight")): layer for layer in layers}
    return None if None in places else places  # type: ignore[return-value]
