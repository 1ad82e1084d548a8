"""Find every place where a tensor enters a matrix product, by watching one forward pass.

No class names and no tracing: a function mode sees each product at the level at which it can be tapped, every module
tells when its forward runs, and a dispatch mode underneath sees what the hardware is really told to multiply. A product
that shows up only underneath (inside a fused recurrent layer, say) is one that no tap can reach; it is kept in
:attr:`Watched.unreachable`, and :func:`planish.network.coverage.check_covered` makes it an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from planish.errors import PlanishError
from planish.network.batches import call_model, copied, tensors_of
from planish.network.modes import evaluating
from planish.network.products import Call, ProductMode, prepares_weights
from planish.network.rows import divides_rows

# Modules whose forward is exactly one product of their own input and weight: their input is tapped where it comes in.
_PLAIN_FORWARDS = {
    cls.forward
    for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
# Products that PyTorch's table of floating-point operations does not list.
_EXTRA_PRODUCTS = {"mv", "dot", "addmv", "mkldnn_rnn_layer", "_native_multi_head_attention", "_trilinear",
                   "_transformer_encoder_layer_fwd", "_cdist_forward", "_euclidean_dist",
                   "_cudnn_rnn", "miopen_rnn", "_lstm_mps", "_grouped_mm", "_sparse_addmm", "conv_tbc",
                   "_int_mm", "_scaled_mm"}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A place where one tensor enters one matrix product."""

    name: str
    owner: str  # path of the module that holds the tap
    slot: str  # key of the tap in that module
    role: str  # "weight", "input" (of a layer with a weight) or "operand" (of a product without one)
    shape: tuple[int, ...]
    channel_axis: int | None = None  # output channels of a weight, heads of an attention's probabilities
    parameter: bool = False  # the tensor is the owner's parameter called `slot`

    @property
    def is_weight(self) -> bool:
        return self.role == "weight"


@dataclass
class Product:
    """One matrix product of the model: who computes it, from which sites, at what cost."""

    module: str
    key: str  # "linear", "matmul1": the operator and which call of it this is
    operator: str
    sites: tuple[Site, ...]
    macs: int = 0  # multiply-accumulates for one image

    @property
    def name(self) -> str:
        return f"{self.module}.{self.key}" if self.module else self.key

    @property
    def weight(self) -> Site | None:
        return next((site for site in self.sites if site.is_weight), None)


@dataclass
class Watched:
    """What one forward pass showed: the products in the order of execution, and those that no tap can reach."""

    products: list[Product] = field(default_factory=list)
    unreachable: list[Product] = field(default_factory=list)
    batch: int = 1  # images in the example

    @property
    def sites(self) -> list[Site]:
        return list({site.name: site for product in self.products for site in product.sites}.values())


@dataclass
class _Frame:
    path: str
    module: nn.Module
    calls: Counter[str] = field(default_factory=Counter)


class _Recorder(ProductMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.frames: list[_Frame] = [_Frame("", model)]
        self.found: dict[str, Product] = {}
        self.unreachable: dict[str, Product] = {}
        self.current: Product | None = None
        # a parameter that several modules hold goes by its first name
        self.parameters: dict[int, tuple[str, str]] = {}
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.parameters.setdefault(id(parameter), (path, name))

    def by_row(self) -> bool:
        return divides_rows(self.frames[-1].module)

    def product(self, call: Call) -> Any:
        frame = self.frames[-1]
        operator = call.signature.operator
        count = frame.calls[operator]
        frame.calls[operator] += 1
        key = operator if count == 0 else f"{operator}{count}"
        name = f"{frame.path}.{key}"
        if name not in self.found:
            self.found[name] = Product(frame.path, key, operator, tuple(self._sites(call, frame, key)))
        outer, self.current = self.current, self.found[name]
        try:
            return call.compute(call.operands)
        finally:
            self.current = outer

    def _sites(self, call: Call, frame: _Frame, key: str) -> Iterator[Site]:
        signature = call.signature
        tensors = list(call.operands.values())
        # a layer's weight is its second operand; elsewhere a weight is what is a parameter or a view of one
        if signature.weighted:
            weights = [i == 1 for i in range(len(tensors))]
            # a layer holds its weight as (out, in, ...)
            axes: tuple[int | None, ...] = (None, 1 if signature.transposed else 0)
        else:
            weights = [id(t) in self.parameters or id(t._base) in self.parameters for t in tensors]
            axes = call.channel_axes
        plain = type(frame.module).forward in _PLAIN_FORWARDS
        for i, (name, tensor) in enumerate(call.operands.items()):
            shape, is_weight = tuple(tensor.shape), weights[i]
            axis = axes[i] if is_weight and len(shape) > 1 else None
            if key.startswith("attention_av") and name == "probabilities" and len(shape) > 3:
                axis = len(shape) - 3
            held = self.parameters.get(id(tensor)) if is_weight else None
            if held is not None:
                yield Site(_join(*held), *held, "weight", shape, axis, True)
                continue
            slot = "input" if plain and i == 0 else f"{key}_{name}"
            role = "weight" if is_weight else ("input" if any(weights) else "operand")
            yield Site(_join(frame.path, slot), frame.path, slot, role, shape, axis, False)

    @contextmanager
    def frames_of(self, model: nn.Module) -> Iterator[None]:
        """While this is open, every module announces when its forward runs, however it is called."""
        modules = [(path, module) for path, module in model.named_modules() if path]
        own = [module.__dict__.get("forward") for _, module in modules]
        for path, module in modules:
            module.__dict__["forward"] = self._announced(path, module)
        try:
            yield
        finally:
            for (_, module), forward in zip(modules, own, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _announced(self, path: str, module: nn.Module) -> Any:
        forward = module.forward

        @wraps(forward)
        def announced(*args: Any, **kwargs: Any) -> Any:
            self.frames.append(_Frame(path, module))
            try:
                return forward(*args, **kwargs)
            finally:
                self.frames.pop()

        return announced


class _Meter(TorchDispatchMode):
    """Counts multiply-accumulates and notices the products that the recorder did not see coming."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if prepares_weights():
            return out
        packet = func._overloadpacket
        name = packet.__name__
        macs = 0
        if packet in flop_registry:
            macs = int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
        elif name in ("mv", "dot", "addmv"):
            macs = max(a.numel() for a in args if isinstance(a, Tensor))
        elif name == "mkldnn_rnn_layer":  # input (steps, batch, features), then the weights of input and state
            macs = args[0].shape[:-1].numel() * (args[1].numel() + args[2].numel())
        elif name == "mul" and getattr(self.recorder.current, "operator", "") == "einsum":
            macs = out.numel()  # how einsum sums over a dimension of size 1
        elif name not in _EXTRA_PRODUCTS:
            return out
        product = self.recorder.current
        if product is None:
            path = self.recorder.frames[-1].path
            key = f"{path}.{name}"
            product = self.recorder.unreachable.setdefault(key, Product(path, name, f"aten::{name}", ()))
        product.macs += macs
        return out


def watch(model: nn.Module, example: Any) -> Watched:
    """Run ``model`` once on ``example`` in evaluation mode and list its matrix products.

    Args:
        model: any module that runs. It comes back as it was: mode, hooks and buffers untouched.
        example: a batch (tensor, tuple of arguments or dict of keywords); its first dimension is the batch.

    Returns:
        The products in the order of execution, each with its sites and its multiply-accumulates for one image.

    Raises:
        PlanishError: the model does not run on the example, changes it, or has taps already.
    """
    first = next(iter(example.values())) if isinstance(example, dict) else example
    first = first[0] if isinstance(first, (tuple, list)) else first
    batch = max(1, first.shape[0]) if isinstance(first, Tensor) and first.dim() else 1
    if any(hasattr(type(module), "_planish_class") for module in model.modules()):
        raise PlanishError(
            f"the model {type(model).__name__} has taps already: watch (or quantize) the model that it was made from, "
            f"or take them off with planish.network.detach"
        )
    recorder = _Recorder(model)
    with torch.inference_mode(False):  # outside it tensors count how often they are changed in place
        looked_at = copied(example)
    try:
        # inside inference mode PyTorch does not break composite functions up into what the meter counts
        undisturbed = torch.inference_mode(False), torch.no_grad(), evaluating(model)
        with ExitStack() as stack:
            for context in (*undisturbed, recorder.frames_of(model), _Meter(recorder), recorder):
                stack.enter_context(context)
            call_model(model, looked_at)
    except PlanishError:
        raise
    except Exception as error:  # whatever the model raises is about the example
        shapes = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise PlanishError(
            f"the model {type(model).__name__} does not run on an example of shape {shapes}: {error}"
        ) from error
    if any(tensor._version for tensor in tensors_of(looked_at)):
        raise PlanishError(
            f"the model {type(model).__name__} changes its images in place, and it is shown the same images several "
            "times: let its forward make new tensors, such as x = x - mean in place of x.sub_(mean)"
        )
    products = list(recorder.found.values())
    unreachable = list(recorder.unreachable.values())
    for product in products + unreachable:
        product.macs = -(-product.macs // batch)  # rounded up: what is computed from parameters alone must not vanish
    return Watched(products, unreachable, batch)


def _join(path: str, slot: str) -> str:
    return f"{path}.{slot}" if path else slot
