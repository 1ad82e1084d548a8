"""Integer codes as bytes at their true width, and back, exactly.

The codes form one stream of bits, the first code first, each from its lowest bit up: bit k of the stream is bit
``k % 8`` of byte ``k // 8``, and code i has the bits from ``i * bits`` on. So eight codes take ``bits`` bytes, and at
2, 4 and 8 bits no code crosses the border of a byte. What is left of the last byte is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planish.errors import PlanishError

_EIGHT = 8  # codes that fill a whole number of bytes at every width


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes of ``codes``, which are whole numbers from 0 to ``2^bits - 1`` of any dtype and shape (N elements).

    Returns:
        uint8 tensor of shape (``packed_size(N, bits)``,).

    Raises:
        PlanishError: a code is no whole number or does not fit.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    fits = (flat >= 0) & (flat < 2**bits)
    if flat.is_floating_point():
        fits &= flat == flat.round()
    if not bool(fits.all()):
        raise PlanishError(f"codes of {bits} bits are whole numbers from 0 to {2**bits - 1}")
    count = flat.numel()
    rows = torch.zeros(-(-count // _EIGHT), _EIGHT, dtype=torch.uint8)
    rows.view(-1)[:count] = flat.to(torch.uint8)
    words = torch.zeros(len(rows), dtype=torch.int64)  # eight codes in its lowest bits, bytes in little-endian order
    for i in range(_EIGHT):
        words |= rows[:, i].long() << (bits * i)
    octets = torch.stack([(words >> (8 * i)) & 255 for i in range(bits)], 1)
    return octets.to(torch.uint8).reshape(-1)[: packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes in ``packed``, uint8 of shape (count,); the inverse of :func:`pack`.

    Raises:
        PlanishError: the number of bytes is another, or a bit after the last code is set.
    """
    _check_bits(bits)
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != size:
        raise PlanishError(f"{count} codes of {bits} bits are {size} bytes, not {tuple(packed.shape)} {packed.dtype}")
    rest = 8 * size - count * bits
    if rest and int(packed[-1]) >> (8 - rest):
        raise PlanishError("bits after the last code are set")
    octets = torch.zeros(-(-count // _EIGHT), bits, dtype=torch.uint8)
    octets.view(-1)[:size] = packed
    words = torch.zeros(len(octets), dtype=torch.int64)
    for i in range(bits):
        words |= octets[:, i].long() << (8 * i)
    codes = torch.empty(len(octets), _EIGHT, dtype=torch.uint8)
    for i in range(_EIGHT):
        codes[:, i] = ((words >> (bits * i)) & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(-1)[:count]


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise PlanishError(f"codes have 2 to 8 bits, not {bits!r}")
