"""Codes travel with a tensor that is only rearranged, and are gone as soon as its values change."""

import pytest
import torch
import torch.nn.functional as F

from planish.deploy.coded import Coded
from planish.scheme import Format
from tests.deploy.coding import FORMATS, code, code_shifted, random

MOVES = {
    "transpose": lambda x: x.transpose(0, 1),
    "T": lambda x: x[0].T,
    "mT": lambda x: x.mT,
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: torch.reshape(x, (4, 6)),
    "permute": lambda x: x.permute(2, 0, 1),
    "chunk": lambda x: x.chunk(2)[1],
    "split": lambda x: torch.split(x, [1, 2], dim=1)[1],
    "unbind": lambda x: x.unbind(2)[3],
    "slice": lambda x: x[:, 1:, ::2],
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "expand": lambda x: x[:1].expand(5, -1, -1),
    "flip": lambda x: x.flip(0),
    "contiguous": lambda x: x.mT.contiguous(),
    "reflect": lambda x: F.pad(x, (1, 2), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 2), "circular"),
    "repeat": lambda x: x.repeat_interleave(3, 1),
}


def values(coded):
    """What the codes and the grid say the values are."""
    steps = coded.codes.float() - coded.zero_point + coded.offset
    return steps * coded.scale if coded.after is None else steps * coded.scale + coded.after


def coded_kinds():
    yield code(random(2, 3, 4), FORMATS["u4"])
    yield code(random(2, 3, 4), FORMATS["half2"], axis=1)
    yield code(random(2, 3, 4), Format(3, "group", group_size=4))
    yield code_shifted(random(2, 3, 4), FORMATS["u8"], random(4), random(4, seed=1))


@pytest.mark.parametrize("move", MOVES)
def test_codes_move_with_the_values(move):
    for x in coded_kinds():
        moved = MOVES[move](x)
        assert isinstance(moved, Coded)
        assert torch.equal(moved.plain, MOVES[move](x.plain))
        assert torch.equal(moved.plain, values(moved))
        assert moved.codes.dtype == x.codes.dtype
        if x.after is None:
            assert torch.equal(moved.steps * moved.unit, values(moved))


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0, lambda x: x * 1, lambda x: x.relu(), lambda x: x.half(), lambda x: F.pad(x, (1, 1)), torch.abs],
)
def test_other_operations_give_plain_tensors(change):
    x = code(random(2, 3, 4), FORMATS["u4"])
    assert type(change(x)) is torch.Tensor
    assert torch.equal(change(x), change(x.plain))


@pytest.mark.parametrize(
    "change", [lambda x: x.add_(1), lambda x: F.relu(x, inplace=True), lambda x: x.__setitem__(0, 7.0)]
)
def test_a_change_in_place_takes_the_codes_away(change):
    x = code(random(2, 4), FORMATS["u4"])
    weight = code(random(3, 4, seed=1), FORMATS["s4"])
    expected = x.plain.clone()
    change(expected)
    change(x)
    assert x.codes is None
    assert torch.equal(F.linear(x, weight), F.linear(expected, weight.plain))


def test_what_changes_nothing_keeps_the_codes():
    x = code(random(2, 4), FORMATS["u4"])
    assert x.to(torch.float32).codes is x.float().codes is x.codes
    assert x.shape == (2, 4)
    assert x.detach().codes is not None
    assert x.requires_grad is False
