"""Small networks and images that every test of this folder looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class _Tokens(nn.Module):
    """One block of attention on the rows of an image."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm, self.attn = nn.Linear(8, width), nn.LayerNorm(width), _Attention(width, 2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        return self.head((x + self.attn(self.norm(x))).mean(1))


def attention_net(seed: int = 0) -> nn.Module:
    """About 400 weights: LayerNorm, fused attention, no BatchNorm."""
    torch.manual_seed(seed)
    return _Tokens().eval()


def conv_net(seed: int = 0) -> nn.Module:
    """About 500 weights: two convolutions with BatchNorm that has seen something, one linear layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
    return net.eval()


def images(model: nn.Module, count: int = 40, batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(1, 8, 8) images whose labels are what the network would say of them without a little noise in its logits."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    with torch.no_grad():
        training = model.training
        logits = model.eval()(x)
        model.train(training)
    labels = (logits + 0.3 * logits.std() * torch.randn(logits.shape, generator=generator)).argmax(-1)
    return list(zip(x.split(batch), labels.split(batch), strict=True))
