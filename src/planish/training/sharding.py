"""FSDP2: while a network is trained its parameters, gradients and optimizer state are split over the processes.

``accelerate launch --use_fsdp --fsdp_version 2`` asks for it. ``fully_shard`` (torch) splits the first dimension of
every parameter, block by block: a block is an element of a list or a sequence of modules. The network is split in place
when a training begins and put together in place when it ends, with the parameters it had, so that what follows finds an
ordinary network. Parameters of taps (learned steps) are numbers or small; they stay whole, and their gradients are
averaged here. Ingredients that change weights one by one are not made for parts of them: see ``Ingredient.sharded``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.taps import CHILD


def asked_for(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP2, and there are processes to split over.

    Raises:
        PlanishError: it asked for FSDP1.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:
        return False
    # the environment and not the plugin, which Accelerate makes for accelerators only: CPUs can do it, too
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise PlanishError(
            "FSDP of version 1 flattens parameters, which hides them from the taps: give --fsdp_version 2"
        )
    return True


class Sharding:
    """A network split over the processes, until ``undo``."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = model.to(accelerator.device)
        whole = {parameter for name, parameter in model.named_parameters() if CHILD in name.split(".")}
        self.modules = [(module, type(module), _hooks(module)) for module in model.modules()]
        self.places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter not in whole
        ]
        for block in _blocks(model):
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)
        for module, name, parameter in self.places:
            if module._parameters[name] is not parameter:
                parameter.data = parameter.data.new_empty(0)  # the split one has the values; this one comes back

    @torch.no_grad()
    def undo(self) -> None:
        """Put the network together again; all processes have to come here."""
        full: dict[int, Tensor] = {}  # a parameter in several places is put together once
        for module, name, parameter in self.places:
            split = module._parameters[name]
            assert split is not None
            if split is parameter:
                continue
            if id(parameter) not in full:
                full[id(parameter)] = parameter.data = whole(split.detach())
                parameter.grad = None
            module._parameters[name] = parameter
        from torch.distributed import _composable_state

        known = getattr(_composable_state, "_module_state_mapping", {})
        for module, kind, before in self.modules:
            module.__class__ = kind
            known.pop(module, None)  # or it could not be split a second time
            for key in [key for key in module.__dict__ if key not in before]:
                del module.__dict__[key]
            for key, hooks in before.items():
                if hooks is not None:
                    module.__dict__[key].clear()
                    module.__dict__[key].update(hooks)


def _hooks(module: nn.Module) -> dict[str, dict[Any, Any] | None]:
    """What a module has, and of its hooks which."""
    return {key: dict(value) if key.endswith("_hooks") else None for key, value in module.__dict__.items()}


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of lists and sequences that hold parameters, inner ones first."""
    lists = (nn.Sequential, nn.ModuleList)
    for module in reversed(list(model.modules())):
        for child in module.children() if isinstance(module, lists) else ():
            if not isinstance(child, lists) and next(child.parameters(), None) is not None:
                yield child


def is_split(tensor: Any) -> bool:
    """Whether a tensor is one process's part of a whole."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, sharing its memory; a whole tensor as it is."""
    return tensor._local_tensor if is_split(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; all of them have to ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def part_like(tensor: Tensor, split: Tensor) -> Tensor:
    """Of a whole tensor the part that this process has of ``split``, which has the same shape."""
    if not is_split(split):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    place: Any = split
    return local(distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None))


def copy_into(mine: Tensor, saved: Tensor) -> None:
    """Copy a whole tensor into one that may be split."""
    local(mine).copy_(part_like(saved.to(local(mine).device), mine))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm over all tensors, split ones counted once."""
    if not any(is_split(tensor) for tensor in tensors):
        return torch.stack(torch._foreach_norm(list(tensors))).norm()
    zero = torch.zeros((), device=local(tensors[0]).device)
    split = sum((local(t).float().square().sum() for t in tensors if is_split(t)), zero.clone())
    torch.distributed.all_reduce(split)
    return sum((t.float().square().sum() for t in tensors if not is_split(t)), split).sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> None:
    """What ``torch.nn.utils.clip_grad_norm_`` does, of gradients that may be split."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    factor = (most / (norm(gradients) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


@torch.no_grad()
def average_whole(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Average the gradients of the parameters that are not split, which ``fully_shard`` leaves alone."""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_split(p)]
    if gradients:
        flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


@contextmanager
def without_exchange(model: Any) -> Iterator[None]:
    """Inside, gradients add up in each process and are not exchanged."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def refuse(model: nn.Module, ingredients: Iterable[Any]) -> None:
    """Raise :class:`PlanishError` for what needs whole weights all the time."""
    found = [type(one).__name__ for one in (*ingredients, *model.modules()) if not getattr(one, "sharded", True)]
    if found:
        raise PlanishError(
            f"{found[0]} works on whole weights, which FSDP2 splits over the processes: leave --use_fsdp out (each "
            f"process then holds the whole network), or choose another method or noise"
        )
