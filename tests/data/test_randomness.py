"""One generator a sample: a function of (seed, epoch, index), and unlike any other."""

from __future__ import annotations

import torch

from planish.data.randomness import generator_for


def test_a_generator_depends_on_seed_epoch_and_index_alone():
    def numbers(*key: int) -> torch.Tensor:
        return torch.randn(2000, generator=generator_for(*key))

    first = numbers(0, 0, 0)
    torch.manual_seed(1)
    assert torch.equal(numbers(0, 0, 0), first)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**63, 0, 0)):
        assert abs(torch.corrcoef(torch.stack([first, numbers(*other)]))[0, 1]) < 0.1
