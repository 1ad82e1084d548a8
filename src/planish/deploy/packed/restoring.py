"""From the checked content of a checkpoint to a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planish.deploy.packed.agreement import BUFFERS, check_grid, check_values, grow, tap_prefix
from planish.deploy.packed.architecture import Layout, named_tensors
from planish.deploy.packed.container import Table, tensor_at
from planish.deploy.packed.head import Head
from planish.deploy.packed.packing import unpack
from planish.functional import Grid, dequantize
from planish.network import Site, attach
from planish.quantizers import ShiftedQuantizer, UniformQuantizer
from planish.scheme import Format
from planish.task import TASKS, say_task


class Restoring:
    """The tensors of a checked file on their way into a model."""

    def __init__(self, head: Head, table: Table, data: bytearray) -> None:
        self.head, self.table, self.data = head, table, data
        self.sites: dict[str, tuple[Site, Format]] = {}
        if head.assignment is not None:
            self.sites = {site.name: (site, fmt) for site, fmt in head.assignment.quantized()}

    def stored(self, key: str) -> Tensor:
        """A tensor as it is in the file; it may share its memory."""
        constant = self.head.constant.get(key)
        if constant is not None:
            return torch.full(constant.shape, constant.value, dtype=constant.dtype)
        return tensor_at(self.data, self.table.entries[key])

    def own(self, site: Site) -> dict[str, Tensor]:
        """What belongs to the tap of a site."""
        prefix = tap_prefix(site)
        names = [n for n in BUFFERS if prefix + n in self.table.entries or prefix + n in self.head.constant]
        return {name: self.stored(prefix + name) for name in names}

    def check(self) -> None:
        """Look at the values, while nothing but the file is in memory."""
        for site, fmt in self.sites.values():
            check_grid(site, fmt, self.own(site))
        for key in self.table.entries:
            if key not in self.head.packed:
                check_values(key, self.stored(key))

    def grid(self, site: Site, fmt: Format) -> Grid:
        own = self.own(site)
        scale, zero_point = (grow(own[name], site, fmt) for name in BUFFERS[:2])
        return Grid(scale, zero_point, fmt.qmin, fmt.qmax, fmt.offset)

    def tensor(self, key: str) -> Tensor:
        """A tensor of the model; it may share the memory of the file."""
        packed = self.head.packed.get(key)
        if packed is None:
            return self.stored(key)
        site, fmt = self.sites[packed.site]
        codes = unpack(self.stored(key), fmt.bits, torch.Size(packed.shape).numel()).view(packed.shape)
        exact = torch.float64 if packed.dtype == torch.float64 else torch.float32
        return dequantize(codes.to(exact) + fmt.qmin, self.grid(site, fmt)).to(packed.dtype)

    def fill(self, place: Tensor, key: str) -> None:
        """Give a parameter or a buffer of the model its values, in its own memory if they have its dtype."""
        values = self.tensor(key)
        if place.dtype == values.dtype:
            place.copy_(values)
        else:
            place.data = values.clone()

    def tap(self, site: Site) -> nn.Module | None:
        if site.name not in self.sites:
            return None
        own, fmt = self.own(site), self.sites[site.name][1]
        kind = ShiftedQuantizer if "before" in own else UniformQuantizer
        made = kind(fmt, channel_axis=site.channel_axis or 0)
        made.grid = self.grid(site, fmt)
        if isinstance(made, ShiftedQuantizer):
            made.before, made.after = own["before"].clone(), own["after"].clone()
        return made

    def into(self, model: nn.Module, layout: Layout) -> nn.Module:
        """Fill a model of the architecture that has been checked."""
        head = self.head
        for key in [k for k in (*self.table.entries, *head.constant) if k in layout.biases]:
            owner, _, _ = key.rpartition(".")
            model.get_submodule(owner)._parameters["bias"] = nn.Parameter(self.tensor(key).clone())
        places = {key: tensor for key, tensor, _ in named_tensors(model)}
        filled: set[int] = set()
        for key, tensor in places.items():
            if key in head.tied:
                continue
            if id(tensor) in filled:  # tied in the architecture, but not in the model that was saved
                owner, _, slot = key.rpartition(".")
                model.get_submodule(owner)._parameters[slot] = nn.Parameter(self.tensor(key).clone())
            else:
                self.fill(tensor, key)
                filled.add(id(tensor))
        for name, first in head.tied.items():
            owner, _, slot = name.rpartition(".")
            model.get_submodule(owner)._parameters[slot] = places[first]  # type: ignore[assignment]
        model.eval()
        if head.assignment is not None:
            attach(model, head.assignment.products, self.tap)
            model.requires_grad_(False)
            model.planish_assignment = head.assignment  # type: ignore[assignment]
        model.planish_recipe, model.planish_preprocessing = head.recipe, head.preprocessing  # type: ignore[assignment]
        model.planish_protocol, model.planish_classes = head.protocol, head.classes  # type: ignore[assignment]
        if head.protocol.get("task") in TASKS:
            say_task(model, head.protocol["task"])
        return model
