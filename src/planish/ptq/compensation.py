"""One linear map beside every residual block of a quantized network, in closed form.

QwT ("quantization without tears", Fu et al. 2025, arXiv 2411.13918, section 3.2): block l computes
``block(x) + W x + b``, with W and b from the ridge regression of what quantization has taken from the block's output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from glob import escape
from itertools import product as combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network import Product, attach, detach, taps_of
from planish.network.batches import call_model, first_image
from planish.network.compensated import CHILD, add_compensation
from planish.network.modes import evaluating
from planish.ptq.layers import LayerCall
from planish.ptq.lockstep import Halt, run_in_lockstep
from planish.ptq.passes import Calibration
from planish.ptq.ridge import moments, solve_ridge


@dataclass
class _Seen:
    calls: int = 0
    version: int = -1  # of the input, which PyTorch counts up when a tensor is changed in place
    fits: bool = False
    shape: tuple[int, ...] = ()


def find_blocks(model: nn.Module, example: Any, products: Iterable[Product]) -> list[tuple[str, int, bool]]:
    """The residual blocks that can be compensated, as :func:`add_compensation` takes them, in the order of execution.

    Blocks are the innermost entries of a ``nn.Sequential`` or ``nn.ModuleList`` that hold at least two products with
    weights, but not the first one of the network, and that turn one tensor into another of the same shape.
    """
    weighted = [p for p in products if p.weight is not None]
    held = {path: [p for p in weighted if p.module.startswith(path + ".")] for path in _entries(model)}
    seen = _watch_calls(
        model, example, [p for p, inside in held.items() if len(inside) > 1 and weighted[0] not in inside]
    )
    found = [path for path, note in seen.items() if note.fits and note.calls == 1]
    found = [path for path in found if not any(other.startswith(path + ".") for other in found)]
    blocks = []
    for path in sorted(found, key=lambda path: weighted.index(held[path][0])):
        inside, shape = held[path], seen[path].shape
        if not any(p.module.endswith(f".{CHILD}") for p in inside):  # it is compensated already
            convolution = len(shape) == 4 and any(p.operator == "conv2d" for p in inside)
            blocks.append((path, shape[1] if convolution else shape[-1], convolution))
    return blocks


def _entries(model: nn.Module) -> Iterator[str]:
    """Paths of the entries of lists and sequences. A sequence has no shortcut: it is no block itself."""
    for path, parent in model.named_modules():
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            for name, child in parent.named_children():
                if not isinstance(child, nn.Sequential):
                    yield f"{path}.{name}" if path else name


def _watch_calls(model: nn.Module, example: Any, paths: Iterable[str]) -> dict[str, _Seen]:
    seen = {path: _Seen() for path in paths}
    with ExitStack() as stack:
        for path, note in seen.items():
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(_before(note)).remove)
            stack.callback(module.register_forward_hook(_after(note)).remove)
        with evaluating(model), torch.no_grad():
            call_model(model, example)
    return seen


def _before(note: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        note.calls += 1
        if args and isinstance(args[0], Tensor):
            note.version = args[0]._version

    return hook


def _after(note: _Seen) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.dim() > 1:
            # a block that changes its input in place leaves nothing to fit to
            note.fits = args[0]._version == note.version and args[0].shape == output.shape
            note.shape = tuple(output.shape)

    return hook


@dataclass(frozen=True)
class BlockCompensation:
    """Add to every residual block a linear map of its input that corrects its output towards the float network's.

    For a block whose input is X (a row of ones for the bias) and whose output lacks E of the float network's,
    [W b] = E X^T (X X^T + lam m I)^-1 with m the mean of the diagonal of X X^T; the bias is not penalized. Blocks are
    done in the order of execution, so that X comes from the compensated blocks before. Goes last, after the weights
    are rounded. The maps stay in float, as the ledger says: their products are put on the list of those that may.

    The targets are the blocks' outputs in the network as it was given, so passes that leave those as they were up to
    quantization may come before; a pass that rotates the stream between the blocks may not.

    Attributes:
        lam: of the ridge, as a share of the mean diagonal.

    Raises:
        PlanishError: lam is not above 0, or values in the network are not finite.
    """

    lam: float = 0.1

    name = "block-compensation"

    def __post_init__(self) -> None:
        if not 0 < self.lam < float("inf"):
            raise PlanishError(
                f"{self.name}: lam is {self.lam}: give a share of the mean diagonal above 0, such as 0.1"
            )

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        model, given = calibration.model, calibration.given
        if given is None:
            raise PlanishError(f"{self.name}: the calibration has no float network: set given to it")
        taps, before = dict(taps_of(model)), calibration.assignment
        detach(model)
        blocks = find_blocks(model, first_image(calibration.batches[0]), before.products)
        if add_compensation(model, blocks=blocks):
            names = tuple(f"{escape(path)}.{CHILD}" for path, *_ in blocks)
            calibration.allow = (*calibration.allow, *names)
            calibration.plan_anew()
            formats = {**calibration.assignment.formats, **before.formats}
            calibration.assignment = replace(calibration.assignment, formats=formats)
        attach(model, calibration.assignment.products, lambda site: taps.get(site.name))
        if blocks:
            with evaluating(given):
                self._fit(model, given, [path for path, *_ in blocks], calibration.batches)
        text = f"{len(blocks)} blocks got a linear map in float" if blocks else "no residual block was found"
        calibration.note(self.name, text)

    def _fit(self, model: nn.Module, given: nn.Module, paths: Sequence[str], batches: Sequence[Any]) -> None:
        """Set the maps, block by block, all images at the same time."""

        def decide(path: str, ends: list[tuple[Tensor, Tensor]]) -> None:
            added: Any = model.get_submodule(path)._modules[CHILD]
            here, there = ends[: len(batches)], ends[len(batches) :]
            calls = [LayerCall(f"{path}.{CHILD}", *_call(added, x)) for x, _ in here]
            missing = (exact - ours for (_, ours), (_, exact) in zip(here, there, strict=True))
            change = solve_ridge(*moments(calls, missing, ones=True), self.lam, ones=True)
            added.weight.copy_(calls[0].from_matrix(change[..., :-1]))
            added.bias.copy_(change[0, :, -1])

        current = threading.local()

        def walk(network: nn.Module, batch: Any) -> Callable[[Halt], None]:
            def run(halt: Halt) -> None:
                current.halt = halt
                call_model(network, batch)

            return run

        def at_block(path: str, network: nn.Module) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
                current.halt(path, (args[0], output))
                return output + module._modules[CHILD](args[0]) if network is model else None  # type: ignore[misc]

            return hook

        with ExitStack() as stack:
            for network, path in combinations((model, given), paths):
                handle = network.get_submodule(path).register_forward_hook(at_block(path, network))
                stack.callback(handle.remove)
            run_in_lockstep([walk(network, batch) for network, batch in combinations((model, given), batches)], decide)


def _call(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Any, dict[str, Any]]:
    operands = {"input": x, "weight": layer.weight, "bias": layer.bias}
    if isinstance(layer, nn.Linear):
        return F.linear, operands
    return F.conv2d, {**operands, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
