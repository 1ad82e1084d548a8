"""Two linear layers with a GELU between them: where they are, and a ReLU in its place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.network.batches import call_model
from planish.network.modes import evaluating
from planish.network.rebuilding import exchange, rebuilder


@dataclass(frozen=True)
class MLP:
    """Two linear layers with a GELU between them, by paths of modules."""

    first: str
    gelu: str
    second: str


@rebuilder("relu")
def put_relu(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Exchange the modules at ``paths`` for ReLUs, in place; returns the paths."""
    for path in paths:
        exchange(model, path, nn.ReLU())
    return list(paths)


def find_mlps(model: nn.Module, example: Any, also: tuple[type[nn.Module], ...] = ()) -> list[MLP]:
    """The MLPs of ``model`` in the order of execution: linear layers with nothing but a module that is GELU between.

    They are found by watching one forward pass, by the memory of tensors; what is a GELU is told by its values, or is a
    module of a class in ``also``. Each of the three modules has to run once, and no other linear layer may read what
    the GELU gives; other readers are not seen. A GELU that is called as a function is not found.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles: list[Any] = []
    fast = torch.backends.mha.get_fastpath_enabled()

    def watch(path: str, module: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((path, args[0], output))

        handles.append(module.register_forward_hook(keep))

    with evaluating(model), torch.no_grad():
        gelus = {path for path, module in model.named_modules() if isinstance(module, also) or _is_gelu(module)}
        try:
            for path, module in model.named_modules():
                if isinstance(module, nn.Linear) or path in gelus:
                    watch(path, module)
            torch.backends.mha.set_fastpath_enabled(False)  # which makes nested tensors and calls no modules
            call_model(model, example)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()
    paths = [path for path, *_ in calls]
    once = [call for call in calls if paths.count(call[0]) == 1]
    linear = [call for call in once if getattr(model.get_submodule(call[0]), "bias", None) is not None]
    makers = {_place(output): path for path, _, output in linear}
    readers = defaultdict(list)
    for path, entering, _ in calls:
        if path not in gelus:
            readers[_place(entering)].append(path)
    single = [path for path, *_ in linear]
    found = []
    for path, entering, output in once:
        behind = readers[_place(output)]
        if path in gelus and _place(entering) in makers and len(behind) == 1 and behind[0] in single:
            found.append(MLP(makers[_place(entering)], path, behind[0]))
    return found


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    # not by identity of objects: a dropout that is off gives another one with the same memory
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _is_gelu(module: nn.Module) -> bool:
    """Whether a module without parameters and without modules inside gives what GELU gives, exact or by tanh."""
    if any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return False
    probe = torch.linspace(-4, 4, 33)
    try:
        with torch.no_grad():
            output = module(probe.clone())
    except Exception:
        return False  # it takes something else than one tensor
    return isinstance(output, Tensor) and any(
        output.shape == probe.shape and bool((output - F.gelu(probe, approximate=how)).abs().max() < 1e-5)
        for how in ("none", "tanh")
    )
