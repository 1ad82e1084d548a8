"""Re-estimate BatchNorm statistics after the weights have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from planish.network.batches import call_model
from planish.network.modes import evaluating


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running means and variances by averages over ``batches`` of inputs; returns the batches used.

    Every layer keeps its ``eps``, ``momentum`` and train/eval mode. Only the BatchNorm layers are in training mode
    while the averages are taken, so dropout stays off. A layer in evaluation mode within a model in training mode is
    frozen: it keeps its statistics. With several processes each rank must see the same batches or call this on
    synchronised layers. A model without BatchNorm is not run at all.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and (module.training or not model.training)
    ]
    if not norms:
        return 0
    saved = [(norm.momentum, {k: v.clone() for k, v in norm.named_buffers(recurse=False)}) for norm in norms]
    used, done = 0, False
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in batches:
                call_model(model, batch)
                used += 1
        done = used > 0
    finally:
        for norm, (momentum, buffers) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            if not done:  # no batch, or an error on the way
                for name, value in buffers.items():
                    getattr(norm, name).copy_(value)
    return used
