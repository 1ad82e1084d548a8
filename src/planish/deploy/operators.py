"""One operator that stands for fake quantization in an exported graph.

``torch.export`` spells a quantizer out as a division, a rounding and so on. While :func:`visible_quantizers` is open
every quantizer calls the one operator ``planish::fake_quantize`` instead, which an exporter can translate as a whole:
``torch.onnx.export(..., custom_translation_table={torch.ops.planish.fake_quantize.default: ...})``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from planish import functional
from planish.errors import PlanishError
from planish.functional import Grid
from planish.network import taps_of
from planish.quantizers import UniformQuantizer


@torch.library.custom_op("planish::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    offset: float,
    granularity: str,
    axis: int,
    group_size: int,
    site: str,
) -> Tensor:
    """Nearest grid value of each element of ``x``, as :func:`planish.functional.fake_quantize` gives it.

    Args:
        x: (...) what is quantized; for a weight the latent parameter.
        scale, zero_point: float32, broadcast against ``x``: (), (1, ..., channels, ..., 1) along ``axis``, (tokens, 1),
            or for groups the shape of ``x``. The zero point holds integers.
        qmin, qmax: smallest and largest code.
        offset: 0.5 on the half-integer grid, else 0.
        granularity: ``"tensor"``, ``"channel"``, ``"group"`` or ``"token"``: who shares a scale.
        axis: counted from the front: the axis of the channels for ``"channel"`` and ``"group"``; -2 for ``"token"``, -1
            for ``"tensor"``.
        group_size: elements that share a scale for ``"group"``; else 0.
        site: name of the site, as the ledger has it.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    # an operator must not return its own argument or a view of it: the maths gives a fresh tensor
    return functional.fake_quantize(x, Grid(scale, zero_point, qmin, qmax, offset))


@fake_quantize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class _Visible(UniformQuantizer):
    """A quantizer that goes through the operator."""

    planish_site: str

    def forward(self, x: Tensor) -> Tensor:
        grid, kind = self.grid, self.format.granularity
        axis = {"tensor": -1, "token": -2}.get(kind, self.channel_axis % max(1, x.dim()))
        size = self.format.group_size if kind == "group" else 0
        out: Tensor = fake_quantize(
            x, grid.scale, grid.zero_point, grid.qmin, grid.qmax, grid.offset, kind, axis, size, self.planish_site
        )
        return out


def _visible_class(cls: type[nn.Module]) -> type[nn.Module]:
    # behind the class in the order of resolution, so that what a subclass does around its grid stays around it
    return _Visible if cls is UniformQuantizer else type(cls.__name__, (cls, _Visible), {})


@contextmanager
def visible_quantizers(model: nn.Module) -> Iterator[None]:
    """While this is open, every quantizer of ``model`` calls the operator ``planish::fake_quantize``.

    The operator's first input is what the quantizer gets: an activation, or the latent weight. A
    :class:`~planish.quantizers.ShiftedQuantizer` adds its shifts before and after the operator. A site that is passed
    several times in one forward (a layer called twice, a tied weight) calls it as often.

    Raises:
        PlanishError: a tap of the model is no quantizer with a fixed grid (a model in training, say).
    """
    quantizers = list(taps_of(model))
    for site, tap in quantizers:
        if not isinstance(tap, UniformQuantizer):
            raise PlanishError(
                f"{site}: the tap there is a {type(tap).__name__} and no quantizer with a fixed grid; export what "
                f"planish.quantize or planish.train gave back"
            )
    classes = [type(tap) for _, tap in quantizers]
    for site, tap in quantizers:
        tap.__class__ = _visible_class(type(tap))
        tap.__dict__["planish_site"] = site
    try:
        yield
    finally:
        for (_, tap), cls in zip(quantizers, classes, strict=True):
            tap.__class__ = cls
            del tap.__dict__["planish_site"]
