"""In what precision products are computed while a pass learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from planish.errors import PlanishError

PRECISIONS = ("float32", "bfloat16")


def check_precision(precision: str) -> None:
    """Raise :class:`PlanishError` if there is no such precision."""
    if precision not in PRECISIONS:
        raise PlanishError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Matrix products of float32 tensors as ``precision`` says, forward and backward; afterwards as they were.

    ``bfloat16`` lets PyTorch round the factors to bfloat16 (to TF32 on GPUs) where the processor multiplies these
    faster, and sum in float32. Everything else, the quantizers among it, stays in float32. Processors without such
    instructions compute as before.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
