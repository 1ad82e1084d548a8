"""BatchNorm over the images of all processes, so that a batch gives the same network however it is split.

``torch.nn.SyncBatchNorm`` does it on accelerators only, for equally many images everywhere, and as a module of another
class. Here the calls of ``F.batch_norm`` are caught, whichever module they come from (timm has classes of its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each depends on what all of them put in, and so do the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _Sum.apply(gradient)


class _Mode(TorchFunctionMode):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        return batch_norm(*args, **(kwargs or {}), counts=self.counts)


@contextmanager
def over_all(counts: bool) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalizes by the images of all processes; all of them have to compute.

    Args:
        counts: whether the images of this process count. One that got none computes one that does not.
    """
    with _Mode(counts):
        yield


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    counts: bool = True,
) -> Tensor:  # fmt: skip
    """``F.batch_norm`` over the images of all processes; running statistics become the same everywhere.

    Raises:
        ValueError: if there is one value for each channel, over all processes.
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    share = float(counts)
    own = x.new_tensor([share * x.numel() / x.shape[1]])
    total = _Sum.apply(torch.cat([x.sum(dims) * share, own]))
    count = total[-1].detach()
    if x.numel() == x.shape[1] and count <= 1:  # the others are only asked for where it may be
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(input.shape)}")
    mean = total[:-1] / count
    centred = x - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims) * share) / count
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
            if running is not None:
                running.lerp_(now.to(running.dtype), momentum)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    out = centred * scale.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(input.dtype)
