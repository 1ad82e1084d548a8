"""Networks that tools based on torch.fx can trace."""

from __future__ import annotations

import copy

from timm.layers import AvgPool2dSame
from torch import nn


def traceable(model: nn.Module) -> nn.Module:
    """A copy that gives the same. Its poolings pad by a constant: what timm computes from the size of the image, which
    stops tracing, is the same for every size where the stride is one. Its attention is spelled out in products."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, AvgPool2dSame):
            if any(step != 1 for step in module.stride):
                raise ValueError(f"the padding of {name} depends on the size of the image")
            height, width = (size - 1 for size in module.kernel_size)
            around = (width // 2, width - width // 2, height // 2, height - height // 2)
            twin.set_submodule(name, nn.Sequential(nn.ZeroPad2d(around), nn.AvgPool2d(module.kernel_size, 1)))
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return twin
