"""A walk through networks that halts at each layer with a weight, and holds the activations of one batch at a time.

A pass that decides layer by layer needs the inputs of a layer for all images, with the layers before it decided. To
hold every batch where it has come to takes memory in proportion to the number of images. Here a batch is run anew up
to each layer, from the last place where the network can be cut (``network/units.py``); only what passes there is kept
for all images, beyond a limit in files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from planish.errors import PlanishError
from planish.network import Product, Site, attach, detach
from planish.network.batches import call_model, first_image, size_of
from planish.network.taps import taps_of
from planish.network.units import Unit, find_units, first_tensor
from planish.ptq.flow import returning
from planish.ptq.layers import LayerCall, layer_arguments
from planish.ptq.shelf import Shelf

Decide = Callable[[str, Iterable[tuple[LayerCall, ...]]], None]


class _Mark(nn.Module):
    """Lets the parameter pass, through its tap if there is one, with the name of its site."""

    def __init__(self, site: str, tap: nn.Module | None) -> None:
        super().__init__()
        self.site, self.tap = site, tap

    def forward(self, x: Tensor) -> Tensor:
        # without a tap the same memory: what is decided about the parameter is seen here
        marked: Any = (x if self.tap is None else self.tap(x)).detach()
        marked.planish_site = self.site
        return marked  # type: ignore[no-any-return]


class _Arrived(BaseException):
    """A forward pass has come to where it was sent; no ``Exception``, so that no model takes it for its own."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


class _Halts(TorchFunctionMode):
    """Ends a forward pass at the first call of a marked layer that is not ``decided``."""

    def __init__(self, decided: Collection[str]) -> None:
        super().__init__()
        self.decided = decided

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        bound = layer_arguments(func, args, kwargs)
        site = None if bound is None else getattr(bound["weight"], "planish_site", None)
        if site is not None and site not in self.decided:
            assert bound is not None
            raise _Arrived(LayerCall(site, func, bound))
        return func(*args, **kwargs)


@dataclass
class _Walk:
    """Where the images are: at the input, or behind the link ``units[known]``, with what passes there."""

    networks: Sequence[nn.Module]
    batches: Sequence[Any]
    units: Sequence[Unit]
    shelf: Shelf
    decided: set[str] = field(default_factory=set)
    known: int = -1
    cached: list[Tensor] = field(default_factory=list)  # for each network, a row an image

    def __post_init__(self) -> None:
        sizes = [size_of(batch) for batch in self.batches]
        self.rows = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    def reach(self, network: int, batch: int) -> LayerCall | None:
        """The first call of a layer that is not decided; ``None`` if the forward pass comes to its end."""
        try:
            with self._from_the_cut(network, batch), _Halts(self.decided):
                call_model(self.networks[network], self.batches[batch])
        except _Arrived as arrived:
            found: LayerCall = arrived.found
            return found
        return None

    def calls(self, first: LayerCall) -> Iterator[tuple[LayerCall, ...]]:
        """The calls of a layer, batch by batch: one of each network."""
        for batch in range(len(self.batches)):
            calls = []
            for network in range(len(self.networks)):
                call = first if (network, batch) == (0, 0) else self.reach(network, batch)
                if call is None or call.site != first.site:
                    raise PlanishError(
                        f"one calibration batch reaches {first.site} where another reaches "
                        f"{call.site if call else 'the end'}: this pass needs a network that takes the same path for "
                        f"every batch; give batches for which it does"
                    )
                calls.append(call)
            yield tuple(calls)

    def cut(self, index: int) -> None:
        """Go on from the outputs of the link ``units[index]``, if they are a tensor with a row an image."""
        held: list[Tensor] = []
        for network, model in enumerate(self.networks):
            for batch, rows in enumerate(self.rows):
                output = first_tensor(self._output(network, batch, model.get_submodule(self.units[index].path)))
                if not isinstance(output, Tensor) or output.shape[:1] != (rows.stop - rows.start,):
                    for tensor in held:
                        self.shelf.give_back(tensor)
                    return
                if batch == 0:
                    held.append(self.shelf.room(self.rows[-1].stop, output.shape[1:], output.dtype))
                held[-1][rows] = output
        for tensor in self.cached:
            self.shelf.give_back(tensor)
        self.known, self.cached = index, held

    def _output(self, network: int, batch: int, module: nn.Module) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            raise _Arrived(output)

        handle = module.register_forward_hook(leave)
        try:
            with self._from_the_cut(network, batch):
                call_model(self.networks[network], self.batches[batch])
        except _Arrived as arrived:
            return arrived.found
        finally:
            handle.remove()
        return None

    def _from_the_cut(self, network: int, batch: int) -> ExitStack:
        """The link at the cut gives what it gave, and those before it, whose outputs do not matter, zeros."""
        stack, model = ExitStack(), self.networks[network]
        if self.known < 0:
            return stack
        device = next((p.device for p in model.parameters()), None)
        value = self.cached[network][self.rows[batch]].to(device)
        for i, unit in enumerate(self.units[: self.known + 1]):
            if i == self.known or unit.link:
                stack.enter_context(returning(model.get_submodule(unit.path), unit, value, zeros=i != self.known))
        return stack


def visit_layers(
    networks: Sequence[nn.Module],
    products: Sequence[Product],
    batches: Sequence[Any],
    wanted: Collection[str],
    decide: Decide,
    *,
    memory: float = 4.0,
    rounded: bool = False,
) -> set[str]:
    """Take all images through the networks, as far as each of the layers in turn, in the order of execution.

    Args:
        networks: of the same structure; each keeps the taps that it has, except those on ``wanted`` weights, which
            are used as they are until the walk is over (but see ``rounded``). The taps see images more than once.
        products: of these networks.
        wanted: names of the sites of weights that are parameters.
        decide: called with the site and its calls, one tuple a batch, with the call in each network. They are computed
            as they are asked for, so that only one batch is held, and can be gone through once. What ``decide`` writes
            into the parameters is what the images go on with. A weight that is used more than once is decided at its
            first use.
        memory: gigabytes of outputs of blocks, for all images, that are held in memory; beyond it, in temporary files.
        rounded: ``wanted`` weights keep their taps, too.

    Returns:
        The sites that were visited. A weight is left out if what multiplies with it is not one of ``OPERATORS``.

    Raises:
        PlanishError: the network takes another path for one batch than for another.
    """
    present = [dict(taps_of(network)) for network in networks]
    shelf = Shelf(memory * 1e9)

    def marked(taps: dict[str, nn.Module]) -> Callable[[Site], nn.Module | None]:
        def tap(site: Site) -> nn.Module | None:
            own = taps.get(site.name)
            return _Mark(site.name, own if rounded else None) if site.name in wanted else own

        return tap

    try:
        walk = _Walk(networks, batches, _units(networks[0], products, batches), shelf)
        for network, taps in zip(networks, present, strict=True):
            network.eval()
            attach(network, products, marked(taps))
        with torch.no_grad():
            _go(walk, products, wanted, decide)
    finally:
        shelf.close()
        for network, taps in zip(networks, present, strict=True):
            attach(network, products, lambda site, taps=taps: taps.get(site.name))  # type: ignore[misc]
    return walk.decided


def _go(walk: _Walk, products: Sequence[Product], wanted: Collection[str], decide: Decide) -> None:
    sites = {p.name: p.weight.name for p in products if p.weight is not None and p.weight.name in wanted}
    inside = [{sites[name] for name in unit.products if name in sites} for unit in walk.units]
    while (first := walk.reach(0, 0)) is not None:
        decide(first.site, walk.calls(first))
        walk.decided.add(first.site)
        for index, (unit, mine) in enumerate(zip(walk.units, inside, strict=True)):
            if first.site in mine and unit.link and index > walk.known and mine <= walk.decided:
                walk.cut(index)


def _units(network: nn.Module, products: Sequence[Product], batches: Sequence[Any]) -> list[Unit]:
    if not batches:
        return []
    bare = copy.deepcopy(network)
    detach(bare)
    return find_units(bare, first_image(batches[0]), products)


def peek(calls: Iterable[tuple[LayerCall, ...]]) -> tuple[tuple[LayerCall, ...], Iterator[tuple[LayerCall, ...]]]:
    """The first of the calls that :func:`visit_layers` hands out, and all of them."""
    rest = iter(calls)
    first = next(rest)
    return first, chain([first], rest)


def check_memory(name: str, memory: float) -> None:
    """Raise a :class:`PlanishError` if the pass ``name`` was given no sensible number of gigabytes."""
    if not 0 <= memory < float("inf"):
        raise PlanishError(f"{name}: memory is {memory}: give a number of gigabytes, 0 or larger")
