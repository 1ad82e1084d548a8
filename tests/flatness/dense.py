"""What the diagnosis is compared with: the folded network as a plain function of its parameters."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from planish.flatness.subject import Subject
from planish.network import detach
from tests.flatness.networks import images


def subject_of(model: nn.Module, *schemes: str) -> Subject:
    return Subject.prepare(model, images(model), schemes or ["w4a4"])


def mlp(scale: float = 1.0) -> nn.Module:
    """Linear, ReLU, linear, with a factor moved from the second layer to the first one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    with torch.no_grad():
        net[1].weight.mul_(scale)
        net[1].bias.mul_(scale)
        net[3].weight.div_(scale)
    return net


def plain(subject: Subject) -> tuple[nn.Module, dict[str, str]]:
    """The folded network without a tap, and its parameters by the names of the sites of its weights."""
    model = copy.deepcopy(subject.model)
    detach(model)
    names = {s.name: f"{s.owner}.{s.slot}" for s in subject.sites if s.is_weight}
    return model.requires_grad_(), names


def dense_loss(model: nn.Module, parameters: dict[str, torch.Tensor], batches) -> torch.Tensor:
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)
