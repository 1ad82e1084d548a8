"""Devices, optimizers and seeds: the small things that the training loop and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.taps import CHILD
from planish.training.sharding import is_split

if TYPE_CHECKING:
    from planish.training.loop import TrainingSettings

_DEFAULTS = {"sgd": (0.02, 5e-4), "adamw": (5e-4, 0.05)}  # learning rate, weight decay


def make_accelerator(mixed_precision: str | None = "no") -> Accelerator:
    """The accelerator of this process; loaders keep their own shuffling, which already depends on (seed, epoch) alone.

    ``None`` takes the precision as it is, for work that computes in float whatever the training before it did.
    """
    if mixed_precision not in (None, "no", "bf16", "fp16"):
        raise PlanishError(f"mixed precision is {mixed_precision!r}: choose no, bf16 or fp16")
    state = AcceleratorState._shared_state
    if mixed_precision is not None and state and state.get("_mixed_precision") != mixed_precision:
        # Accelerate keeps one precision for the whole process; a second training may want another one.
        AcceleratorState._reset_state(reset_partial_state=False)
    try:
        return Accelerator(
            mixed_precision=mixed_precision, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
            # running statistics are those of all processes (see batchnorm.py), not taken from the first one
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )  # fmt: skip
    except ValueError as error:  # Accelerate's own, for a precision that this device has not
        raise PlanishError(f"mixed-precision {mixed_precision}: {' '.join(str(error).split())}") from error


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """One seed for one step of one process; steps and ranks far apart in the generator's state."""
    return ((seed * 1_000_003 + step) * 65_537 + rank + 1) & (2**63 - 1)


def seed_generators(seed: int, device: torch.device) -> None:
    """``torch.manual_seed`` for work on one device.

    On a CPU it is a hundred times faster: where PyTorch could use an accelerator but has not yet, every call of
    ``torch.manual_seed`` is written down with a stack trace, to be repeated there.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def begin_epoch(loader: Any, epoch: int, seed: int) -> None:
    """Make the next iteration of a loader that of one epoch, whatever was read from it or drawn before."""
    # A stock shuffling sampler draws from the global generator or from its own: both begin anew with the epoch.
    torch.manual_seed(step_seed(seed, -1 - epoch))
    sampler = inner = loader
    while inner is not None:
        sampler, inner = inner, getattr(inner, "batch_sampler", None)
        inner = getattr(sampler, "sampler", None) if inner is None else inner
    if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
        generator.manual_seed(step_seed(seed, -1 - epoch))
    for target in (loader, sampler, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if target is not None and hasattr(target, "set_epoch"):
            target.set_epoch(epoch)


def equalize_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the buffers of the first."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def any_process(flag: Any, accelerator: Accelerator) -> bool:
    """Whether any process says so; processes that decided differently would wait for each other."""
    return any_processes([flag], accelerator)[0]


def any_processes(flags: Sequence[Any], accelerator: Accelerator) -> list[bool]:
    """For each flag whether any process has set it."""
    if accelerator.num_processes == 1:
        return [bool(flag) for flag in flags]
    told = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return (accelerator.reduce(told) > 0).tolist()  # type: ignore[operator, union-attr]


def gather_rows(part: Tensor, accelerator: Accelerator, counts: Sequence[int] | None = None) -> Tensor:
    """The rows of all processes, one below the other.

    Args:
        counts: how many each process has, where all of them know it; they may differ.
    """
    if accelerator.num_processes == 1:
        return part
    if counts is None:
        counts = accelerator.gather(torch.tensor([len(part)], device=part.device)).tolist()
    padded = part.contiguous()
    if len(part) < max(counts):
        padded = part.new_zeros((max(counts), *part.shape[1:]))
        padded[: len(part)] = part
    rows = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(rows, padded)
    return torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> tuple[torch.optim.Optimizer, float]:
    """The optimizer and its peak learning rate; weight decay on tensors of two or more dimensions only.

    "auto" is SGD for networks with BatchNorm and AdamW for others, and for those that have LayerNorm as well: a
    transformer behind a convolutional stem is a transformer. A group's ``share`` is what it gets of the learning rate
    of a step.
    """
    name = settings.optimizer
    if name == "auto":
        kinds = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
        batchnorm, layernorm = (any(isinstance(m, kind) for m in model.modules()) for kind in kinds)
        name = "sgd" if batchnorm and not layernorm else "adamw"
    if name not in _DEFAULTS:
        raise PlanishError(f"optimizer is {name!r}: choose auto, {' or '.join(_DEFAULTS)}")
    default_lr, default_decay = _DEFAULTS[name]
    lr = default_lr if settings.lr is None else settings.lr
    decay = default_decay if settings.weight_decay is None else settings.weight_decay
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    trained = [p for n, p in named if f"{CHILD}." not in n]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        # step sizes and their like: a scale for each channel has as many dimensions as its weight, but is none
        {"params": [p for n, p in named if f"{CHILD}." in n], "weight_decay": 0.0, "share": settings.quantizer_lr},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise PlanishError("no parameter of the model requires a gradient, so there is nothing to train")
    fused = not any(is_split(p) for _, p in named)  # there is no fused SGD for split parameters
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=fused), lr
    return torch.optim.AdamW(groups, lr=lr, fused=fused), lr
