"""A "network" whose Hessian is known: its loss is a quadratic form in its weights, the same for every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Quadratic(nn.Module):
    """Output w^T A w / 2 for every image; the mean of the outputs as loss has the Hessian A."""

    def __init__(self, matrix: Tensor, parts: int = 1) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        torch.manual_seed(0)
        weights = torch.randn(len(matrix), dtype=matrix.dtype)
        self.parts = nn.ParameterList(part.clone() for part in weights.chunk(parts))

    def forward(self, x: Tensor) -> Tensor:
        w = torch.cat(list(self.parts))
        product = self.matrix * w if self.matrix.dim() == 1 else self.matrix @ w
        return (w @ product / 2).expand(len(x), 1)


def mean_output(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.mean()


def nothing(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Images that do not matter."""
    return [(torch.zeros(count, 1), torch.zeros(count, dtype=torch.long))]


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=values.dtype))
    return q @ torch.diag(values) @ q.T
