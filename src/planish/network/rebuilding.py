"""Changes of structure: each has a name, so that a file can say it and a network can be rebuilt from its recipe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from torch import nn

from planish.errors import PlanishError

P = ParamSpec("P")
T = TypeVar("T")

TURNED = "turned-channels"  # a note of what is no change of structure
NOTES = "planish_rebuilt"  # attribute of a rebuilt network: what was done to it, in order
# What PyTorch's transformer layers ask before they leave for kernels that read the parameters past the modules.
SHORTCUTS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_REBUILDERS: dict[str, Callable[..., Any]] = {}


def rebuilder(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register a function ``f(model, **arguments)`` that changes the modules of a network in place.

    A call that changes something (its result is not empty) is noted in the network with its arguments, which must be
    plain values. The function is called again when the network is built anew to take the weights of a file: it has to
    make the same modules and names of tensors, whatever the values of the weights are.
    """

    def register(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def noted(*args: P.args, **kwargs: P.kwargs) -> T:
            result = function(*args, **kwargs)
            if result:
                given = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
                model = given.pop(next(iter(given)))
                model.__dict__.setdefault(NOTES, []).append({"name": name, "arguments": given})
            return result

        _REBUILDERS[name] = noted
        return noted

    return register


def rebuilt(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to the structure of ``model``, in order: names and arguments."""
    return [dict(note) for note in getattr(model, NOTES, ())]


def exchange(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of that at ``path`` and under every other name that the network has for it.

    What is new in it takes over whether the old one was training. PyTorch's transformer layers around it no longer
    leave for kernels that do not call their modules.
    """
    old = model.get_submodule(path)
    kept = set(old.modules())
    for part in module.modules():
        if part not in kept:
            part.training = old.training
    for name in [name for name, found in model.named_modules(remove_duplicate=False) if found is old]:
        model.set_submodule(name, module)
        parts = name.split(".")
        for around in (model.get_submodule(".".join(parts[:end])) for end in range(len(parts))):
            for kind, asked in SHORTCUTS.items():
                if isinstance(around, kind):
                    setattr(around, asked, False)


@rebuilder(TURNED)
def turned_channels(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Changes nothing; notes that channels of ``parts`` were mixed by rotations, so that none is any longer its own."""
    return list(parts)


def has_turned_channels(model: nn.Module) -> bool:
    """Whether the outputs of a layer of ``model`` are no longer those of the network in float, channel by channel."""
    # files that are older than the note say at least where the norms went
    return any(note["name"] in (TURNED, "rms-norm") for note in rebuilt(model))


def rebuild(model: nn.Module, notes: Iterable[Mapping[str, Any]]) -> None:
    """Do the same to a network of the same architecture.

    Raises:
        PlanishError: a name is not known.
    """
    for note in notes:
        if note["name"] not in _REBUILDERS:
            raise PlanishError(
                f"the network was rebuilt by {note['name']!r}, which this planish does not know; "
                f"it knows {', '.join(sorted(_REBUILDERS))}"
            )
        _REBUILDERS[note["name"]](model, **note["arguments"])
