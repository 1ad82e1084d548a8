"""Find the units that a network is reconstructed by: residual blocks where there are such, else layers.

A module is a *link* of the network's chain if everything after it depends on the images only through its output, and it
only through its input: the network may be cut there. No class names are needed: the graph that autograd records of one
forward pass tells. The smallest modules with that property that hold a residual connection are the blocks of BRECQ (Li
et al. 2021, arXiv 2102.05426, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from planish.network.batches import call_model, logits_of, map_tensors
from planish.network.modes import evaluating
from planish.network.sites import Product

LAYERS = 6  # a link with so many weighted products or fewer is not divided further


@dataclass(frozen=True)
class Unit:
    """A module that is reconstructed as a whole.

    Attributes:
        path: of the module.
        products: names of the products inside, in the order of execution.
        link: whether the network may be cut at its input and its output.
        shape: of its output for one image.
        before: links right before it that are one unit with it: it begins where the first of them does.
        rest: what its module returns beside the tensor, the same for all images; None if it returns the tensor itself.
    """

    path: str
    products: tuple[str, ...]
    link: bool
    shape: tuple[int, ...] = ()
    before: tuple[Unit, ...] = ()
    rest: tuple[Any, ...] | None = None

    def returned(self, tensor: Tensor) -> Any:
        """What the module returns when its output is this tensor."""
        return tensor if self.rest is None else (tensor, *self.rest)

    @property
    def name(self) -> str:
        """The paths of its modules, for a person."""
        return " + ".join(unit.path for unit in (*self.before, self))

    @property
    def first(self) -> str:
        """The path of the module that it begins with."""
        return self.before[0].path if self.before else self.path


@dataclass
class _Seen:
    """How a module was called."""

    calls: int = 0
    plain: bool = True  # one tensor in, one out, and nothing else that depends on the images
    before: Any = None  # nodes of the graph that made its input and its output
    after: Any = None
    shape: tuple[int, ...] = ()
    rest: tuple[Any, ...] | None = None


def first_tensor(value: Any) -> Tensor | None:
    """The tensor that a module returns, or the first of the tuple that it returns (as Hugging Face's layers do)."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def find_units(model: nn.Module, example: Any, products: Iterable[Product], *, layers: int = LAYERS) -> list[Unit]:
    """The units of ``model``, in the order of execution, so that each product with a weight is in exactly one.

    Args:
        model: in float, without taps.
        example: inputs of one image.
        products: of the model, as :func:`planish.network.watch` gives them.
        layers: links with at most so many weighted products stay whole; 1: every layer is a unit of its own, where the
            network can be cut around it.
    """
    products = list(products)
    weighted = [product for product in products if product.weight is not None]
    seen, links = _watch(model, example, {product.module for product in weighted})
    divide = _Division(model, products, weighted, seen, links, layers)
    units = divide.within("")
    covered = {name for unit in units for name in unit.products}
    loose = dict.fromkeys(product.module for product in weighted if product.name not in covered)
    units += [divide.unit(path, link=False) for path in loose if path]  # a product of the root itself has no module
    order = {product.name: i for i, product in enumerate(products)}
    return sorted(units, key=lambda unit: order[unit.products[0]])


def join_units(units: Sequence[Unit], products: Iterable[Product], count: int) -> list[Unit]:
    """The units, with the ``count`` adjacent pairs of links joined whose capacities differ most.

    In the manner of MRECG (Ma et al. 2023, arXiv 2303.11906, section 4.2): the error of a reconstruction oscillates
    where a unit has far fewer parameters than its neighbour, and the two had better be one. The capacity is the number
    of weights here, and what is compared is its ratio.
    """
    sizes = {p.name: math.prod(p.weight.shape) for p in products if p.weight is not None}
    capacity = [sum(sizes.get(name, 0) for name in unit.products) for unit in units]
    pairs = [i for i in range(len(units) - 1) if units[i].link and units[i + 1].link and min(capacity[i : i + 2])]
    pairs.sort(key=lambda i: -abs(math.log(capacity[i] / capacity[i + 1])))
    chosen, joined = set(pairs[:count]), list[Unit]()
    for i, unit in enumerate(units):
        if i - 1 in chosen:
            last = joined.pop()
            members = (*last.before, replace(last, before=()))
            unit = replace(unit, products=last.products + unit.products, before=members)
        joined.append(unit)
    return joined


@dataclass
class _Division:
    model: nn.Module
    products: list[Product]
    weighted: list[Product]
    seen: dict[str, _Seen]
    links: set[str]
    layers: int
    order: dict[str, int] = field(default_factory=dict)

    def inside(self, path: str, products: Iterable[Product]) -> list[Product]:
        return [p for p in products if not path or p.module == path or p.module.startswith(path + ".")]

    def unit(self, path: str, *, link: bool) -> Unit:
        names = tuple(product.name for product in self.inside(path, self.products))
        seen = self.seen.get(path, _Seen())
        return Unit(path, names, link, seen.shape, rest=seen.rest)

    def within(self, path: str) -> list[Unit]:
        """The links inside a module, as large as they may be."""
        units = []
        for name, _ in self.model.get_submodule(path).named_children():
            below = f"{path}.{name}" if path else name
            mine = self.inside(below, self.weighted)
            if not mine:
                continue
            if below not in self.links:
                units += self.within(below)
                continue
            parts = self.within(below)
            counts = [len([p for p in mine if p.name in part.products]) for part in parts]
            # two residual blocks in a row are two units, however small; layers without a shortcut around them are one
            divide = sum(counts) == len(mine) and (len(mine) > self.layers or min(counts) > 1)
            units += parts if divide else [self.unit(below, link=True)]
        return units


def _watch(model: nn.Module, example: Any, modules: Iterable[str]) -> tuple[dict[str, _Seen], set[str]]:
    """How the modules that hold products were called, and which of them are links."""
    paths = {path.rsplit(".", cut)[0] for path in modules if path for cut in range(path.count(".") + 1)}
    seen = {path: _Seen() for path in paths}
    handles = []
    for path in paths:
        note, module = seen[path], model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(_before(note), with_kwargs=True))
        handles.append(module.register_forward_hook(_after(note)))
    required = [(p, p.requires_grad) for p in model.parameters()]
    inputs = map_tensors(example, lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    try:
        for parameter, _ in required:  # only what depends on the images is to be in the graph
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            sink = logits_of(call_model(model, inputs)).grad_fn
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for handle in handles:
            handle.remove()
    links = set()
    if sink is not None:
        for path, note in seen.items():
            whole = note.calls == 1 and note.plain and note.after is not None
            if whole and _cuts(sink, note.after) and (note.before is None or _cuts(sink, note.before)):
                links.add(path)
    return seen, links


def _before(note: _Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note.calls += 1
        if not args or not isinstance(args[0], Tensor):
            note.plain = False
            return
        note.before = args[0].grad_fn
        others = [*args[1:], *kwargs.values()]
        note.plain &= args[0].requires_grad and not any(isinstance(t, Tensor) and t.requires_grad for t in others)

    return hook


def _after(note: _Seen) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        more = isinstance(output, (tuple, list)) and any(isinstance(t, Tensor) for t in output[1:])
        if tensor is None or more:
            note.plain = False
            return
        note.after, note.shape = tensor.grad_fn, tuple(tensor.shape)
        note.rest = None if isinstance(output, Tensor) else tuple(output[1:])

    return hook


def _cuts(sink: Any, node: Any) -> bool:
    """Whether every path in the graph from ``sink`` back to an input passes through ``node``."""
    if sink is node:
        return True
    known, stack = {sink, node}, [sink]
    while stack:
        current = stack.pop()
        if hasattr(current, "variable"):  # an input, reached around the node
            return False
        for following, _ in current.next_functions:
            if following is not None and following not in known:
                known.add(following)
                stack.append(following)
    return True
