"""Rotations that spread outliers over all channels before anything is quantized; they are folded into the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.hadamard import random_rotation
from planish.network.rebuilding import turned_channels
from planish.network.residual import find_stream, rotate_stream
from planish.ptq.exactness import check_exact, few_images, require_float
from planish.ptq.passes import Calibration

_Part = Callable[..., None]


@dataclass(frozen=True)
class Rotate:
    """Turn the residual stream and the heads of attention by randomized Hadamard matrices (QuaRot, Ashkboos et al.
    2024, arXiv 2404.00456, without the rotations that would have to be computed at inference).

    The first pass of a list: it changes a network in float. LayerNorms whose affine map and mean can be folded into
    their neighbours become RMSNorms without parameters, so the stream between them can be turned; within each head
    queries and keys are turned alike, and values and the columns of the output projection that read them. The outputs
    stay what they were: each part is tried on a copy first, and one that changes the logits of the first images beyond
    rounding is left out with a note. So is one that the network has no place for.

    Attributes:
        stream: turn the residual stream (timm's ``VisionTransformer`` and models built like it).
        heads: turn queries and keys, values and outputs in each head (wherever there are ``qkv`` and ``proj``).
        seed: of the random signs.

    Raises:
        PlanishError: an option has no such value; the network has taps already.
    """

    stream: bool = True
    heads: bool = True
    seed: int = 0
    name = "rotate"

    def __post_init__(self) -> None:
        for option in ("stream", "heads"):
            if not isinstance(getattr(self, option), bool):
                raise PlanishError(f"{option} of rotate is {getattr(self, option)!r}: give True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise PlanishError(f"seed of rotate is {self.seed!r}: give a whole number, 0 or larger")

    @torch.no_grad()
    def __call__(self, calibration: Calibration) -> None:
        require_float(calibration, self.name)
        model, images, changed = calibration.model, few_images(calibration.batches[0]), []
        for part in self._parts(model):
            try:
                check_exact(model, partial(part, seed=self.seed), images, _what(part))
                part(model, images, seed=self.seed)
                changed.append(_what(part).removeprefix("turning "))
            except PlanishError as error:
                calibration.note(self.name, str(error))
        if changed:
            turned_channels(model, changed)
            calibration.plan_anew()

    def _parts(self, model: nn.Module) -> list[_Part]:
        heads = [_turn_queries_and_keys, _turn_values] if _attentions(model) else [_turn_no_heads]
        return [_turn_residual_stream] * self.stream + heads * self.heads


def _what(part: _Part) -> str:
    return part.__name__.removeprefix("_").replace("turn", "turning", 1).replace("_", " ")


def _turn_residual_stream(model: nn.Module, batch: Any, seed: int) -> None:
    stream = find_stream(model, batch)
    rotate_stream(model, stream, random_rotation(stream.width, torch.Generator().manual_seed(seed)))


def _turn_no_heads(model: nn.Module, batch: Any, seed: int) -> None:
    raise PlanishError("the model has no attention with linear layers qkv and proj, so no heads are turned")


def _turn_queries_and_keys(model: nn.Module, batch: Any, seed: int) -> None:
    attentions = [a for a in _attentions(model) if _absent(a, "q_norm") and _absent(a, "k_norm")]
    if not attentions:
        raise PlanishError("every attention normalizes its queries or keys, so these are not turned")
    generator = torch.Generator().manual_seed(seed)
    for attention in attentions:
        turns = _head_rotations(attention, generator)
        for rows in range(2):
            _turn_rows(attention, rows, turns)


def _turn_values(model: nn.Module, batch: Any, seed: int) -> None:
    attentions = [a for a in _attentions(model) if _absent(a, "norm") and _absent(a, "gate")]
    if not attentions:
        raise PlanishError("every attention normalizes or gates what its heads put out, so values are not turned")
    generator = torch.Generator().manual_seed(seed + 1)  # not the matrices of the queries
    for attention in attentions:
        turns = _head_rotations(attention, generator)
        _turn_rows(attention, 2, turns)
        weight = attention.proj.weight
        turned = torch.einsum("ohd,hed->ohe", weight.double().unflatten(1, (attention.num_heads, -1)), turns)
        weight.copy_(turned.flatten(1))


def _attentions(model: nn.Module) -> list[Any]:
    """Modules that split one linear layer ``qkv`` into queries, keys and values of ``num_heads`` heads."""

    def fits(module: Any) -> bool:
        qkv, proj, heads = (getattr(module, name, None) for name in ("qkv", "proj", "num_heads"))
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
            return False
        return qkv.out_features == 3 * proj.in_features and proj.in_features % heads == 0

    return [module for module in model.modules() if fits(module)]


def _head_rotations(attention: Any, generator: torch.Generator) -> Tensor:
    """(heads, width, width): another matrix for each head."""
    width = attention.proj.in_features // attention.num_heads
    turns = torch.stack([random_rotation(width, generator) for _ in range(attention.num_heads)])
    return turns.to(attention.qkv.weight.device)


def _turn_rows(attention: Any, third: int, turns: Tensor) -> None:
    """Turn queries (0), keys (1) or values (2) in every head: rows of qkv, ordered by third, head, channel."""
    for tensor in (attention.qkv.weight, attention.qkv.bias):
        if tensor is not None:
            rows = tensor.unflatten(0, (3, attention.num_heads, -1))[third]
            rows.copy_(torch.einsum("hed,hd...->he...", turns, rows.double()))


def _absent(attention: Any, name: str) -> bool:
    module = getattr(attention, name, None)
    return module is None or isinstance(module, nn.Identity)
