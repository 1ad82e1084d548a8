"""Codes and bytes: exact at every width, in the order of bits that the format describes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planish.deploy.packed.packing import pack, packed_size, unpack
from planish.errors import PlanishError


def reference(codes, bits):
    """Bit k of the stream is bit k % 8 of byte k // 8; codes from their lowest bit up."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_bytes_are_those_of_the_description_and_codes_come_back(drawn):
    bits, codes = drawn
    packed = pack(torch.tensor(codes, dtype=torch.long), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference(codes, bits)
    assert len(packed) == packed_size(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_numpy_agrees(bits):
    """An outside oracle: numpy's own unpacking of little-endian bits."""
    codes = torch.randint(0, 2**bits, (1001,), generator=torch.Generator().manual_seed(bits))
    stream = np.unpackbits(pack(codes, bits).numpy(), bitorder="little")[: 1001 * bits].reshape(1001, bits)
    assert np.array_equal(stream @ (1 << np.arange(bits)), codes.numpy())


def test_any_shape_and_dtype():
    codes = torch.randint(0, 8, (3, 5, 7))
    expected = pack(codes, 3)
    for other in (codes.float(), codes.to(torch.uint8), codes.double().transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(pack(other, 3), expected)


@pytest.mark.parametrize("codes", [[4.0], [-1.0], [0.5], [float("nan")], [float("inf")]])
def test_what_is_no_code_is_refused(codes):
    with pytest.raises(PlanishError, match="whole numbers from 0 to 3"):
        pack(torch.tensor(codes), 2)


def test_bytes_that_cannot_be_are_refused():
    packed = pack(torch.tensor([1, 2, 3]), 3)  # 9 bits in 2 bytes
    with pytest.raises(PlanishError, match="bits after the last code are set"):
        unpack(packed | torch.tensor([0, 2], dtype=torch.uint8), 3, 3)
    for wrong in (packed[:1], packed.float(), packed[None]):
        with pytest.raises(PlanishError, match="3 codes of 3 bits are 2 bytes"):
            unpack(wrong, 3, 3)
    for bits in (1, 9, 2.0, True):
        with pytest.raises(PlanishError, match="2 to 8 bits"):
            pack(torch.tensor([0]), bits)
