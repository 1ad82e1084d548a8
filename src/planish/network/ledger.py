"""The ledger: what of a model is quantized, how, and what share of its multiply-accumulates that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from planish.errors import PlanishError
from planish.network.coverage import Assignment, assign
from planish.network.rebuilding import TURNED, rebuilt
from planish.network.sites import watch
from planish.network.taps import taps_of
from planish.scheme import Scheme


@dataclass(frozen=True)
class Row:
    """One site. ``share`` is the fraction of the model's multiply-accumulates computed by the site's product."""

    site: str
    operator: str
    role: str
    bits: int | None
    granularity: str
    share: float
    tap: str = ""


@dataclass(frozen=True)
class Ledger:
    """Rows by site, and the share of the multiply-accumulates at each precision (``{"w4a4": 0.93, ...}``).

    ``rebuilt`` names what was done to the network's structure, in order (``network/rebuilding.py``).
    """

    rows: tuple[Row, ...]
    shares: dict[str, float]
    macs: int
    rebuilt: tuple[str, ...] = ()

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        heads = ("site", "operator", "bits", "granularity", "share of MACs")
        table = [
            (r.site, r.operator, "float" if r.bits is None else str(r.bits), r.granularity, f"{100 * r.share:.2f} %")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in [heads, *table]) for i in range(len(heads))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [heads, *table]]
        lines.insert(1, "  ".join("-" * w for w in widths))
        total = ", ".join(f"{name} {100 * share:.2f} %" for name, share in self.shares.items())
        lines.append(f"{self.macs:,} multiply-accumulates for one image: {total}")
        if self.rebuilt:
            lines.append(f"the structure is not that of the network as it was given: {', '.join(self.rebuilt)}")
        return "\n".join(line.rstrip() for line in lines)


def build_ledger(assignment: Assignment, taps: dict[str, str] | None = None) -> Ledger:
    """The ledger of an assignment; ``taps`` may name what sits at each site."""
    total = sum(p.macs for p in assignment.products) + sum(p.macs for p in assignment.allowed if not p.sites)
    rows: list[Row] = []
    shares: dict[str, float] = defaultdict(float)
    for product in assignment.products:
        share = product.macs / total if total else 0.0
        bits: dict[str, str] = {}
        for site in product.sites:
            fmt = assignment.formats[site.name]
            bits["w" if site.is_weight else "a"] = "f" if fmt is None else str(fmt.bits)
            rows.append(
                Row(
                    site.name, product.operator, site.role, fmt.bits if fmt else None, fmt.granularity if fmt else "",
                    share, (taps or {}).get(site.name, ""),
                )
            )  # fmt: skip
        shares[_precision(bits)] += share
    for product in assignment.allowed:
        if not product.sites:
            share = product.macs / total if total else 0.0
            rows.append(Row(product.name, product.operator, "unreachable", None, "", share))
            shares["float"] += share
    return Ledger(tuple(rows), dict(sorted(shares.items(), key=lambda item: -item[1])), total)


def _precision(bits: dict[str, str]) -> str:
    """``{"w": "4", "a": "4"}`` -> ``w4a4``; a product of two activations -> ``a4a4``."""
    if set(bits.values()) == {"f"}:
        return "float"
    if "a" not in bits or bits["a"] == "f":  # weights only
        return f"w{bits['w']}" if "w" in bits else "float"
    return f"w{bits['w']}a{bits['a']}" if "w" in bits else f"a{bits['a']}a{bits['a']}"


def ledger(
    model: nn.Module, scheme: Scheme | str | None = None, *, example: Any = None, allow: Iterable[str] = ()
) -> Ledger:
    """What is quantized in ``model``, site by site; ``print`` it for a table.

    A model that planish has quantized knows its own ledger. For any other model the rows say what ``scheme`` would
    do to it (everything in float if it is None).

    Args:
        example: a batch to run the model on; by default one blank image of the size in the model's ``pretrained_cfg``
            (timm), ``config.image_size`` (Hugging Face) or ``image_size`` (torchvision).

    Raises:
        PlanishError: the input size is not known, or a product can be reached by no tap (see ``allow``).
    """
    known: Assignment | None = getattr(model, "planish_assignment", None)
    if known is not None and scheme is None:
        own = build_ledger(known, {name: type(tap).__name__ for name, tap in taps_of(model)})
        names = (note["name"] for note in rebuilt(model) if note["name"] != TURNED)
        return replace(own, rebuilt=tuple(dict.fromkeys(names)))
    watched = watch(model, example_for(model) if example is None else example)
    plan = assign(watched, scheme or "w8a8", allow=allow)
    if scheme is None:
        plan = Assignment(plan.scheme, plan.products, dict.fromkeys(plan.formats), plan.allowed)
    return build_ledger(plan)


def example_for(model: nn.Module) -> torch.Tensor:
    """One blank image of the size that the model's own configuration names."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size: tuple[int, ...] | None = None
    if isinstance(config, dict):
        size = tuple(config.get("input_size") or ()) or None
    settings = getattr(model, "config", model)  # of Hugging Face, or attributes of torchvision's models
    image_size = getattr(settings, "image_size", None)
    if size is None and isinstance(image_size, (int, tuple, list)):
        side = (image_size, image_size) if isinstance(image_size, int) else image_size
        size = (getattr(settings, "num_channels", 3), *side)
    if size is None:
        raise PlanishError(
            f"{type(model).__name__} does not say what images it takes; pass "
            f"example=torch.zeros(1, channels, height, width)"
        )
    parameter = next(model.parameters(), torch.empty(0))
    if getattr(model, "patch_embed", None) is not None and hasattr(model.patch_embed, "img_size"):
        shown: Any = model.patch_embed.img_size
        size = (size[0], *shown) if shown else size
    in_chans = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))), size[0])
    return torch.zeros(1, in_chans, *size[1:], device=parameter.device, dtype=parameter.dtype)
