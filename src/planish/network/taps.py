"""Put a tap at every site of a model, and take it off again, without editing the model's class.

A tapped module keeps its parameters under their old names. Only its class is exchanged for a subclass made on the spot
(as ``torch.nn.utils.parametrize`` does), which reads weights through their taps, passes the input through its tap and
lets a function mode reach the operands of functional products. The taps live in a child module called
``planish_taps``, so they move with ``.to()``, are copied by ``deepcopy`` and appear in the state dict with the
persistent buffers they have.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.products import Call, ProductMode
from planish.network.rebuilding import SHORTCUTS
from planish.network.rows import divides_rows
from planish.network.sites import Product, Site

CHILD = "planish_taps"


class _Taps(nn.Module):
    """The taps of one module by their slots.

    A slot may be called ``keys`` or ``items``, as a parameter may; ``nn.ModuleDict`` has methods of these names.
    """

    def __init__(self, taps: dict[str, nn.Module]) -> None:
        super().__init__()
        for slot, tap in taps.items():
            self.add_module(slot, tap)

    def __getitem__(self, slot: str) -> Any:
        return self._modules[slot]


def _taps(module: nn.Module) -> Any:
    """The taps in a module by their slots."""
    child = module._modules.get(CHILD)
    return {} if child is None else child._modules


def _idle(taps: Any, slot: str) -> bool:
    """Whether a tensor passes this slot unseen and unchanged."""
    return slot not in taps or getattr(taps[slot], "idle", False)


def _always() -> bool:
    return True


class _Running:
    """A tapped module whose forward is running: its count of products, and the weights that it has read so far."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.calls: Counter[str] = Counter()
        self.weights: dict[str, Tensor] = {}


_RUNNING: list[_Running] = []  # innermost last


@contextmanager
def stepped_out() -> Iterator[None]:
    """For a forward pass that waits while another one runs: inside, no tapped module counts as running."""
    mine = list(_RUNNING)
    _RUNNING.clear()
    try:
        yield
    finally:
        _RUNNING[:] = mine


class _OperandTaps(ProductMode):
    """Passes the operands of the owner's functional products through their taps."""

    def __init__(self, running: _Running) -> None:
        super().__init__()
        self.running = running
        self.owner: Any = running.module

    def mine(self) -> bool:
        return _RUNNING[-1] is self.running

    def by_row(self) -> bool:
        return divides_rows(self.owner)

    def fused(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        taps = _taps(self.owner)
        qk, av = self._key("attention_qk"), self._key("attention_av")
        if not _idle(taps, f"{av}_probabilities"):  # which no fused kernel shows
            for operator in ("attention_qk", "attention_av"):
                self.running.calls[operator] -= 1  # spelled out, they are met again
            return None

        def tapped(slot: str, tensor: Tensor) -> Tensor:
            return tensor if _idle(taps, slot) else taps[slot](tensor)

        # a tap sees the operand as the product takes it
        key = key if _idle(taps, f"{qk}_key") else taps[f"{qk}_key"](key.transpose(-2, -1)).transpose(-2, -1)
        return tapped(f"{qk}_query", query), key, tapped(f"{av}_value", value)

    def product(self, call: Call) -> Any:
        key = self._key(call.signature.operator)
        taps = _taps(self.owner)
        operands = {
            name: taps[f"{key}_{name}"](tensor) if f"{key}_{name}" in taps else tensor
            for name, tensor in call.operands.items()
        }
        return call.compute(operands)

    def _key(self, operator: str) -> str:
        count = self.running.calls[operator]
        self.running.calls[operator] += 1
        key = operator if count == 0 else f"{operator}{count}"
        if key not in self.owner._planish_products:
            raise PlanishError(
                f"{type(self.owner).__name__}: the product {key} in it was not there when the model was watched, so "
                f"nothing taps it; watch the model on an input that takes the same path"
            )
        return key


# In eager mode the function mode keeps PyTorch's transformer layers from kernels that go past the taps; a compiler does
# not tell them that one is active.
_NEVER = property(lambda self: False, lambda self, value: None)


def _tapped_class(
    cls: type[nn.Module], weights: tuple[str, ...], functional: bool, watching: Callable[[], bool] | None
) -> type[nn.Module]:
    @wraps(cls.forward)  # torch.export reads the names of the inputs from the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        taps = _taps(self)
        if "input" in taps:
            if args:
                args = (taps["input"](args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "input": taps["input"](kwargs["input"])}
        running = _Running(self)
        _RUNNING.append(running)
        try:
            if functional or (watching and watching()):
                with _OperandTaps(running):
                    return cls.forward(self, *args, **kwargs)
            return cls.forward(self, *args, **kwargs)
        finally:
            _RUNNING.pop()

    def weight(name: str) -> property:
        return property(lambda self: _read_weight(self, name))

    members: dict[str, Any] = {name: weight(name) for name in weights}
    members |= {name: _NEVER for kind, name in SHORTCUTS.items() if issubclass(cls, kind)}
    if issubclass(cls, nn.Sequential):  # it runs all its children
        members["__iter__"] = lambda self: iter([m for name, m in self._modules.items() if name != CHILD])
    members |= {"forward": forward, "_planish_class": cls, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _read_weight(holder: Any, name: str) -> Tensor | None:
    """The parameter through its tap, once per forward of a module that multiplies with it; else the bare parameter.

    Models also read weights to learn a dtype, or to see whether a fast path is open: that is no product.
    """
    parameter = holder._parameters[name]
    site, owner, slot = holder._planish_weights[name]
    running = _RUNNING[-1] if _RUNNING else None
    if running is None or parameter is None or site not in running.module._planish_uses:
        return parameter
    if site not in running.weights:
        running.weights[site] = _taps(owner or holder)[slot](parameter)
    return running.weights[site]


def attach(
    model: nn.Module, products: Iterable[Product], make_tap: Callable[[Site], nn.Module | None], *,
    watching: Callable[[], bool] = _always,
) -> dict[str, nn.Module]:  # fmt: skip
    """Put ``make_tap(site)`` at every site of ``products``; ``None`` leaves a site alone.

    A tap may have an attribute ``idle``: while it is true for an attention's probabilities, the attention stays fused.

    Args:
        watching: asked in every pass whether products are to be noticed of modules that had none when the model was
            watched; they are an error. It costs a call for every operation of the network, the smallest ones as well.

    Returns:
        The taps by the name of their site. Taps that were there before are replaced.
    """
    detach(model)
    products = list(products)
    taps: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    placed: dict[str, nn.Module] = {}
    for site in {site.name: site for product in products for site in product.sites}.values():
        tap = make_tap(site)
        if tap is not None:
            placed[site.name] = taps[site.owner][site.slot] = tap
    weights = _holders(model, [s for p in products for s in p.sites if s.parameter and s.name in placed])
    by_module: dict[str, list[Product]] = defaultdict(list)
    for product in products:
        by_module[product.module].append(product)
    shortcuts = [path for path, module in model.named_modules() if isinstance(module, tuple(SHORTCUTS))]
    # The model itself gets a mode: it notices products of modules that had none when the model was watched, and keeps
    # PyTorch from the fused kernels of nn.TransformerEncoder, which would go past the taps.
    root = _always if shortcuts else watching
    for path in {"": None, **taps, **weights, **by_module, **dict.fromkeys(shortcuts)}:
        module, own = model.get_submodule(path), by_module.get(path, [])
        uses = {site.name for product in own for site in product.sites}
        # what needs no mode: the input, weights that are read through their taps, and weights that have none
        simple = {f"{path}.input".lstrip("."), *(site for site, *_ in weights.get(path, {}).values())}
        simple |= {site.name for product in own for site in product.sites if site.parameter and site.name not in placed}
        cls = type(module)
        if path in taps:
            module.add_module(CHILD, _Taps(taps[path]))
        module.__dict__["_planish_products"] = frozenset(product.key for product in own)
        module.__dict__["_planish_uses"] = frozenset(uses)
        module.__dict__["_planish_weights"] = weights.get(path, {})
        module.__class__ = _tapped_class(
            cls, tuple(sorted(weights.get(path, {}))), not uses <= simple, None if path else root
        )
    return placed


def replace_tap(model: nn.Module, site: Site, tap: nn.Module) -> None:
    """Put another tap where one is, in place; all others stay."""
    model.get_submodule(site.owner)._modules[CHILD].add_module(site.slot, tap)  # type: ignore[union-attr]


Holding = tuple[str, "nn.Module | None", str]  # name of the site, the module with its tap (None: the holder), its slot


def _holders(model: nn.Module, sites: Iterable[Site]) -> dict[str, dict[str, Holding]]:
    """By path and parameter's name: every place that holds the parameter of one of the sites (if tied, several)."""
    by_id = {id(model.get_submodule(site.owner)._parameters[site.slot]): site for site in sites}
    found: dict[str, dict[str, Holding]] = defaultdict(dict)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            site = by_id.get(id(parameter))
            if site is not None:
                owner = None if site.owner == path else model.get_submodule(site.owner)
                found[path][name] = (site.name, owner, site.slot)
    return dict(found)


def detach(model: nn.Module) -> None:
    """Take all taps off: every module gets its own class back, with the parameters as they are now."""
    for module in list(model.modules()):
        original = getattr(type(module), "_planish_class", None)
        if original is not None:
            module.__class__ = original
            module._modules.pop(CHILD, None)
            for name in ("_planish_products", "_planish_uses", "_planish_weights"):
                del module.__dict__[name]


def taps_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The taps of a model as (name of the site, tap)."""
    for path, module in model.named_modules():
        if hasattr(type(module), "_planish_class"):
            for slot, tap in _taps(module).items():
                yield (f"{path}.{slot}" if path else slot), tap
