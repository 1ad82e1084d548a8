"""The calibration images on their way through the float network and the quantized one, a unit at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from planish.network.batches import call_model, logits_of, map_tensors, size_of, tensors_of
from planish.network.units import Unit, first_tensor
from planish.ptq.shelf import Shelf
from planish.task import task_of


class _Reached(Exception):
    """The forward pass has come to the unit that was asked for."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_there, self.kwargs_there = args, kwargs


@contextmanager
def returning(module: nn.Module, link: Unit, images: Tensor, *, zeros: bool = False) -> Iterator[None]:
    """The module of a link does not run, but returns ``images`` (a row an image), or zeros for as many.

    Every call gives a new tensor, because what follows the link may work in place on it.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return link.returned(images.new_zeros(len(images), *link.shape[1:]) if zeros else images.clone())

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


@contextmanager
def _stopping(module: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class UnitData:
    """What a unit is reconstructed from: a row an image.

    Attributes:
        quantized: its input, as the quantized units before it give it.
        exact: its input in the float network.
        target: its output there.
    """

    quantized: Tensor
    exact: Tensor
    target: Tensor


@dataclass
class Flow:
    """Cached inputs and outputs of the units, and what follows a unit.

    Because a link of the chain may be cut out, the links before the last one whose outputs are known are not run again:
    they return zeros, and that one returns what is cached.

    Args:
        student: the quantized network, with its taps.
        teacher: the float network, of the same modules.
        units: as :func:`planish.network.units.find_units` gives them.
        batches: inputs, of batches of any size.
    """

    student: nn.Module
    teacher: nn.Module
    units: Sequence[Unit]
    batches: Sequence[Any]
    shelf: Shelf
    extra: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    known: int = -1  # the last link whose outputs are cached
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of that link: "student", "teacher"

    def __post_init__(self) -> None:
        self.sizes = [size_of(batch) for batch in self.batches]
        self.images, self.device = sum(self.sizes), _device(self.batches[0])

    def data(self, index: int) -> UnitData | None:
        """The inputs and the target of a unit; ``None`` if it cannot be run on its own."""
        unit = self.units[index]
        if unit.shape[:1] != (1,):
            return None
        quantized = self._inputs("student", index)
        if quantized is None:
            return None
        exact = self._inputs("teacher", index)
        assert exact is not None
        return UnitData(quantized, exact, self._outputs("teacher", index, exact))

    def advance(self, index: int, data: UnitData) -> None:
        """The unit has its final weights: go on from its outputs, if it is a link."""
        outputs = {"teacher": data.target}
        if self.units[index].link:
            outputs["student"] = self._outputs("student", index, data.quantized)
            outputs, self.outputs, self.known = self.outputs, outputs, index
        for tensor in (*outputs.values(), data.quantized, data.exact):
            self.shelf.give_back(tensor)

    def run(self, which: str, index: int, x: Tensor) -> Tensor:
        """The output of a unit for some of its inputs."""
        unit, model = self.units[index], self._model(which)
        more, options = self.extra.get(unit.path, ((), {}))
        if unit.before:
            return self._through(model, index, (x, *more), options)
        found = first_tensor(model.get_submodule(unit.path)(x, *more, **options))
        assert found is not None
        return found

    def suffix(self, index: int, output: Tensor) -> Tensor:
        """The logits of the float network if the link at ``index`` gave ``output``; gradients reach it.

        What comes before does not matter, whichever images are given.
        """
        with self._shortened(self.teacher, index, output):
            return logits_of(call_model(self.teacher, self._any_images(len(output))))

    @torch.no_grad()
    def all_logits(self, batch: Any) -> Tensor:
        """The logits of the float network."""
        return logits_of(call_model(self.teacher, batch))

    def features(self, output: Tensor, index: int, last: str) -> Tensor:
        """As :meth:`suffix`, but what enters the module ``last``, which is not run."""
        try:
            with self._shortened(self.teacher, index, output), _stopping(self.teacher.get_submodule(last)):
                call_model(self.teacher, self._any_images(len(output)))
        except _Reached as reached:
            found: Tensor = reached.args_there[0]
            return found
        raise AssertionError(f"{last} was not run")

    def _model(self, which: str) -> nn.Module:
        return self.student if which == "student" else self.teacher

    def _any_images(self, count: int) -> Any:
        """Inputs of so many images."""
        size = self.sizes[0]
        repeats = -(-count // size)
        return map_tensors(self.batches[0], lambda t: t.repeat(repeats, *[1] * (t.dim() - 1))[:count])

    def _through(self, model: nn.Module, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The output of a unit of several links, and of what lies between them."""
        unit = self.units[index]

        def enter(module: nn.Module, *_: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            raise _Reached((first_tensor(output),), {})

        handles = [
            model.get_submodule(unit.first).register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            model.get_submodule(unit.path).register_forward_hook(leave),
        ]
        try:
            with self._shortened(model, index, args[0], inclusive=False):
                call_model(model, self._any_images(len(args[0])))
        except _Reached as reached:
            found: Tensor = reached.args_there[0]
            return found
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"{unit.name} was not run")

    @contextmanager
    def _shortened(self, model: nn.Module, index: int, value: Tensor, *, inclusive: bool = True) -> Iterator[None]:
        """Links before ``index`` give zeros, and that one (if ``inclusive``) gives ``value``."""
        with ExitStack() as stack:
            for i, unit in enumerate(self.units[: index + inclusive]):
                for link in (*unit.before, unit) if unit.link else ():
                    zeros = i != index or link is not unit
                    stack.enter_context(returning(model.get_submodule(link.path), link, value, zeros=zeros))
            yield

    @torch.no_grad()
    def _inputs(self, which: str, index: int) -> Tensor | None:
        """The input of a unit for every image; ``None`` if it depends on more than one tensor."""
        model, path, result, at = self._model(which), self.units[index].first, None, 0
        for batch, size in zip(self.batches, self.sizes, strict=True):
            cached = self.outputs[which][at : at + size].to(_device(batch)) if self.known >= 0 else torch.empty(0)
            try:
                with self._shortened(model, self.known, cached), _stopping(model.get_submodule(path)):
                    call_model(model, batch)
            except _Reached as reached:
                (x, *more), options = reached.args_there, reached.kwargs_there
            if any(isinstance(value, Tensor) for value in (*more, *options.values())) or len(x) != size:
                return None
            self.extra[self.units[index].path] = (tuple(more), dict(options))
            result = self.shelf.room(self.images, x.shape[1:], x.dtype) if result is None else result
            result[at : at + size] = x
            at += size
        return result

    @torch.no_grad()
    def _outputs(self, which: str, index: int, inputs: Tensor) -> Tensor:
        """The output of a unit for every image."""
        result, at, device = None, 0, _device(self.batches[0])
        for size in self.sizes:
            z = self.run(which, index, inputs[at : at + size].to(device, copy=True))  # it may work in place
            result = self.shelf.room(self.images, z.shape[1:], z.dtype) if result is None else result
            result[at : at + size] = z
            at += size
        assert result is not None
        return result


class Suffix:
    """What follows a link in the float network: its logits, and the features that enter its last layer.

    Args:
        flow: with the networks and the images.
        index: of the link.
        last: path of the last layer with a weight.
        reference: logits of the float network, a row an image.
        reference_features: what enters the last layer there.
    """

    def __init__(self, flow: Flow, index: int, last: str, reference: Tensor, reference_features: Tensor) -> None:
        self.task = task_of(flow.teacher, reference)
        self.flow, self.index, self.last = flow, index, last
        self.reference, self.reference_features = reference, reference_features
        self.device = _device(flow.batches[0])

    def logits(self, output: Tensor) -> Tensor:
        """The logits if the link gave ``output``."""
        return self.flow.suffix(self.index, output)

    def features(self, output: Tensor) -> Tensor:
        """The input of the last layer if the link gave ``output``; the logits, if the link holds that layer."""
        path = self.flow.units[self.index].path
        if self.last == path or self.last.startswith(path + "."):
            return self.logits(output)
        return self.flow.features(output, self.index, self.last)


def _device(inputs: Any) -> torch.device:
    return tensors_of(inputs)[0].device
