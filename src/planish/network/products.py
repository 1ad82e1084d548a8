"""The functions of PyTorch that are matrix products, and one mode that sees every call of them.

``ProductMode`` is the only place that knows how ``F.linear``, ``torch.einsum`` or fused attention take their
operands. The watcher (``sites.py``) and the taps (``taps.py``) both are such modes and differ only in what they do with
the operands. Fused attention is spelled out as its two products (``attention.py``), so that the softmax output, too,
is an operand like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from planish.network import attention


@dataclass(frozen=True)
class Signature:
    """Where a function takes its operands: ``operands`` are (name, position) pairs; the names are keyword names too."""

    operator: str
    operands: tuple[tuple[str, int], ...]
    weighted: bool = False  # the second operand is a weight by its very position (linear, convolutions)
    transposed: bool = False


def _signatures() -> dict[Any, Signature]:
    table: dict[Any, Signature] = {}

    def add(operator: str, functions: Sequence[Any], *operands: tuple[str, int], **flags: bool) -> None:
        for function in functions:
            table[function] = Signature(operator, operands, **flags)

    layer = (("input", 0), ("weight", 1))
    add("linear", [F.linear], *layer, weighted=True)
    for n in (1, 2, 3):
        add(f"conv{n}d", [getattr(F, f"conv{n}d"), getattr(torch, f"conv{n}d")], *layer, weighted=True)
        name = f"conv_transpose{n}d"
        add(name, [getattr(F, name), getattr(torch, name)], *layer, weighted=True, transposed=True)
    T = torch.Tensor
    add("matmul", [torch.matmul, torch.linalg.matmul], ("input", 0), ("other", 1))
    add("matmul", [T.matmul, T.__matmul__], ("self", 0), ("other", 1))
    add("matmul", [T.__rmatmul__], ("other", 1), ("self", 0))
    for mm in ("mm", "bmm"):
        add(mm, [getattr(torch, mm), getattr(T, mm)], ("input", 0), ("mat2", 1))
    add("mv", [torch.mv, T.mv], ("input", 0), ("vec", 1))
    add("addmm", [torch.addmm, T.addmm], ("mat1", 1), ("mat2", 2))
    add("baddbmm", [torch.baddbmm, T.baddbmm], ("batch1", 1), ("batch2", 2))
    add("addbmm", [torch.addbmm, T.addbmm], ("batch1", 1), ("batch2", 2))
    return table


SIGNATURES = _signatures()


@dataclass
class Call:
    """One matrix product about to be computed: the operands by name, and how to compute it from them.

    ``arguments`` are what the function was called with. ``compute`` also takes a ``"bias"`` in place of a layer's own.
    """

    signature: Signature
    operands: dict[str, Tensor]
    compute: Callable[[dict[str, Any]], Any]
    channel_axes: tuple[int | None, ...] = (-2, -1)  # where each operand has its output channels, should it be a weight
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


_BIAS = (("bias", 2),)  # of linear and of all convolutions


def _bind(function: Any, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def find(name: str, position: int) -> Any:
        return args[position] if position < len(args) else kwargs[name]

    def compute(operands: dict[str, Any]) -> Any:
        positional, named = list(args), dict(kwargs)
        for name, position in (*signature.operands, *_BIAS) if "bias" in operands else signature.operands:
            if position < len(positional):
                positional[position] = operands[name]
            else:
                named[name] = operands[name]
        return function(*positional, **named)

    return Call(signature, {n: find(n, p) for n, p in signature.operands}, compute, arguments=(args, kwargs))


def _bind_einsum(args: tuple[Any, ...]) -> Call | None:
    """The call of ``torch.einsum`` on ``args``; ``None`` if nothing is summed over two operands (``"i,j->ij"``)."""
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2:
        return None
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    counts = Counter(label for term in terms for label in set(term) if label != ".")
    kept = set(right) if "->" in equation else {label for label in counts if left.count(label) == 1}
    if not any(count > 1 and label not in kept for label, count in counts.items()):
        return None
    names = [f"operand{i}" for i in range(len(operands))]
    signature = Signature("einsum", tuple(zip(names, range(1, len(operands) + 1), strict=True)))

    def compute(tensors: dict[str, Tensor]) -> Any:
        return torch.einsum(equation, *tensors.values())

    axes = tuple(_output_axis(term, kept, counts) for term in terms)
    return Call(signature, dict(zip(names, operands, strict=True)), compute, axes, ((equation,), {}))


def _output_axis(term: str, kept: set[str], counts: Counter[str]) -> int | None:
    """The last axis of an einsum operand that only this operand brings into the result, counted from the end."""
    labels = term.rpartition("...")[2]
    own = [i - len(labels) for i, label in enumerate(labels) if label in kept and counts[label] == 1]
    return own[-1] if own else None


_preparing = 0


@contextmanager
def preparing_weights() -> Iterator[None]:
    """Products inside make a weight out of weights. They are computed once when the network is shipped, so they are no
    products of the network: nothing records or taps them."""
    global _preparing
    _preparing += 1
    try:
        yield
    finally:
        _preparing -= 1


def prepares_weights() -> bool:
    """Whether a weight is being made."""
    return _preparing > 0


class ProductMode(TorchFunctionMode):
    """Calls :meth:`product` for every matrix product that is computed while the mode is active."""

    def product(self, call: Call) -> Any:
        raise NotImplementedError  # what a subclass is for

    def mine(self) -> bool:
        """Whether the call belongs to the module that this mode looks after."""
        return True

    def by_row(self) -> bool:
        """Whether attention divides each row of its softmax output by the largest value (``network/rows.py``)."""
        return False

    def fused(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the fused attention kernel shall be called with; ``None`` if attention has to be spelled out."""
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        signature = SIGNATURES.get(func)
        if signature is None and func not in _COMPOSITE:
            return func(*args, **kwargs)
        if prepares_weights() or not self.mine():
            return func(*args, **kwargs)
        if signature is not None:
            return self.product(_bind(func, signature, args, kwargs))
        if func is torch.einsum or func is torch.functional.einsum:
            call = _bind_einsum(args)
            return func(*args, **kwargs) if call is None else self.product(call)
        if func is F.scaled_dot_product_attention:
            if len(args) >= 3 and (operands := self.fused(*args[:3])) is not None:
                return func(*operands, *args[3:], **kwargs)
            return attention.scaled_dot_product_attention(
                *args, product=self._attention_product, by_row=self.by_row(), **kwargs
            )
        return attention.multi_head_attention_forward(
            *args, product=self._attention_product, linear=self._attention_linear, by_row=self.by_row(), **kwargs
        )

    def _attention_linear(self, *args: Any) -> Tensor:
        return self.product(_bind(F.linear, SIGNATURES[F.linear], args, {}))

    def _attention_product(self, operator: str, names: tuple[str, str], left: Tensor, right: Tensor) -> Tensor:
        signature = Signature(operator, ((names[0], 0), (names[1], 1)))
        operands = {names[0]: left, names[1]: right}
        return self.product(Call(signature, operands, lambda o: torch.matmul(*o.values())))


_COMPOSITE = {torch.einsum, torch.functional.einsum, F.scaled_dot_product_attention, F.multi_head_attention_forward}
