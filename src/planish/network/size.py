"""The size that the weights of a quantized network really have."""

from __future__ import annotations

from torch import nn

from planish.network.coverage import Assignment
from planish.quantizers import UniformQuantizer


def weights_megabytes(model: nn.Module) -> float:
    """Size of the parameters in 10^6 bytes: quantized ones at their bits and fp32 scales, the rest as is."""
    plan: Assignment | None = getattr(model, "planish_assignment", None)
    bits: dict[int, int] = {}  # by identity: a tied weight has several names
    for site, fmt in plan.quantized() if plan else ():
        if site.parameter:
            bits[id(model.get_submodule(site.owner)._parameters[site.slot])] = fmt.bits
    total = sum(p.numel() * (bits[id(p)] / 8 if id(p) in bits else p.element_size()) for p in model.parameters())
    scales = (m.scale.numel() for m in model.modules() if isinstance(m, UniformQuantizer) and m.fitted)
    return (total + 4 * sum(scales)) / 1e6
