"""How batches are cut, with graphs whose size is known."""

from __future__ import annotations

import pytest
import torch

from planish.flatness.graphs import graph_bytes, plan_graphs


def _squares(inputs, labels):
    """Autograd saves the inputs once (8 values an image) and one more vector of 100 values."""
    weight = torch.ones(100, requires_grad=True)
    return [inputs.requires_grad_() ** 2, weight**2]


def _batches(*counts):
    return [(torch.ones(count, 8), torch.arange(count)) for count in counts]


def test_what_is_saved_counts_once():
    x = torch.ones(5, 8, requires_grad=True)
    assert graph_bytes(lambda inputs, labels: [inputs**2], x, None) == 5 * 8 * 4
    assert graph_bytes(lambda inputs, labels: [inputs**2 + inputs**3], x, None) == 5 * 8 * 4
    assert graph_bytes(lambda inputs, labels: [inputs**2 + (2 * inputs) ** 3], x, None) == 2 * 5 * 8 * 4
    assert graph_bytes(lambda inputs, labels: [inputs**2 + (2 * inputs) ** 3], x, None, [x]) == 5 * 8 * 4


def test_with_room_nothing_is_cut():
    pieces, kept = plan_graphs(_batches(10, 3), _squares, 10**6)
    assert [len(labels) for _, labels in pieces] == [10, 3]
    assert kept == 2


@pytest.mark.parametrize(
    ("memory", "sizes", "kept"),
    [
        (4 * (400 + 4 * 32), [4, 4, 2, 3], 4),  # cut, and yet all fit
        (4 * (400 + 3 * 32), [3, 3, 3, 1, 3], 3),  # one quarter is for those that come and go
        (4 * (400 + 32), [1] * 13, 3),
        (100, [1] * 13, 0),  # an image is never cut
    ],
)
def test_a_piece_takes_a_quarter(memory, sizes, kept, monkeypatch):
    def part_bytes(gradients, inputs, labels, held):
        return 400 + 32 * len(labels)

    monkeypatch.setattr("planish.flatness.graphs.graph_bytes", part_bytes)
    batches = _batches(10, 3)
    pieces, found = plan_graphs(batches, _squares, memory)
    assert [len(labels) for _, labels in pieces] == sizes
    assert found == kept
    assert torch.equal(torch.cat([y for _, y in pieces]), torch.cat([y for _, y in batches]))
    assert torch.equal(torch.cat([x for x, _ in pieces]), torch.cat([x for x, _ in batches]))


@pytest.mark.parametrize(
    ("near", "sizes"),
    [
        (400 + 50 * 32, [30, 30, 20]),  # pieces of one batch are of nearly one length
        (400 + 19 * 32, [15, 15, 15, 15, 10, 10]),
        (0, [15, 15, 15, 15, 10, 10]),  # at most 16 images, and no more pieces than that takes
        (10**6, [60, 20]),
    ],
)
def test_pieces_fit_the_cache_if_they_have_some_images(near, sizes, monkeypatch):
    monkeypatch.setattr("planish.flatness.graphs.graph_bytes", lambda g, x, labels, held: 400 + 32 * len(labels))
    pieces, kept = plan_graphs(_batches(60, 20), _squares, 10**6, near=near)
    assert [len(labels) for _, labels in pieces] == sizes
    assert kept == len(sizes)
    assert torch.equal(torch.cat([y for _, y in pieces]), torch.cat([torch.arange(60), torch.arange(20)]))
    few, _ = plan_graphs(_batches(60, 20), _squares, 4 * (400 + 32), near=near)
    assert all(len(labels) == 1 for _, labels in few)  # memory counts for more


def test_nothing_gives_nothing():
    assert plan_graphs([], _squares, 100) == ([], 0)
    assert plan_graphs(_batches(0), _squares, 100) == ([], 0)
    pieces, kept = plan_graphs(_batches(1), _squares, 10**6)
    assert [len(labels) for _, labels in pieces] == [1]
    assert kept == 1
