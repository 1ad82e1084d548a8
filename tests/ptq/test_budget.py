"""Budgets as they are written, and the integer program against every assignment there is."""

from __future__ import annotations

import itertools
import math
import os
import random

import pytest

from planish.errors import PlanishError
from planish.ptq.budget import Budget, choose, say_cost

WIDTHS = (2, 3, 4, 6, 8)


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("0.9MB", "bytes", 0.9e6), ("450kB", "bytes", 450e3), ("900000", "bytes", 9e5), (" 12 kb ", "bytes", 12e3),
        ("1.GB", "bytes", 1e9), ("7B", "bytes", 7), ("2.5Gbops", "bops", 2.5e9), (".5 tbops", "bops", 0.5e12),
        ("12bops", "bops", 12), ("0.13x", "share", 0.13), ("0.13X", "share", 0.13),
    ],
)  # fmt: skip
def test_what_a_budget_can_look_like(text, kind, amount):
    budget = Budget.parse(text)
    assert budget.kind == kind
    assert budget.amount == pytest.approx(amount)
    assert Budget.parse(budget) is budget
    assert Budget.parse(budget.describe()) == budget


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-3MB", "0", "0x", "0.0MB", "3MiB", "3M", "3 m", "1e6", "1.2.3kB", "w4a4", "3kx", "nanMB", "٣kB", 9],
)
def test_what_it_cannot_look_like(text):
    with pytest.raises(PlanishError, match=r"is not understood: write a size such as 0\.9MB"):
        Budget.parse(text)


def test_amounts_in_four_digits():
    cases = [(912_345, "912.3 kB"), (91_239, "91.24 kB"), (4_000_000, "4 MB"), (12, "12 B"), (1234, "1.234 kB")]
    for amount, text in cases:
        assert say_cost(amount, "bytes") == text
    assert say_cost(2.5e9, "bops") == "2.5 Gbops"
    for amount in (65_399, 65_401, 65_400, 1_000_001, 999_999_999, 123_456_789_012):
        text = say_cost(amount, "bytes", up=True)
        assert amount <= Budget.parse(text).amount <= 1.001 * amount, text


def every_choice(losses, costs, limit):
    """The least loss of all the assignments within the limit."""
    rows = [list(zip(*pair, strict=True)) for pair in zip(losses, costs, strict=True)]
    return min(
        math.fsum(loss for loss, _ in choice)
        for choice in itertools.product(*rows)
        if sum(cost for _, cost in choice) <= limit
    )


def instance(seed):
    """Layers of very different sizes and sensitivities; every other one with losses that do not fall with the width."""
    random.seed(seed)
    layers = random.randint(1, 6)
    sizes = [random.choice([9, 64, 1000, 4096, 589_824]) * random.randint(1, 9) for _ in range(layers)]
    scales = [10 ** random.uniform(-8, 1) for _ in range(layers)]
    losses = [[scale * 4.0**-bits * random.uniform(0.5, 2) for bits in WIDTHS] for scale in scales]
    if seed % 2:
        losses = [random.sample(row, len(row)) for row in losses]
        losses[0][1] = 0.0
    costs = [[size * bits for bits in WIDTHS] for size in sizes]
    least, most = sum(map(min, costs)), sum(map(max, costs))
    return losses, costs, random.randint(least, most)


@pytest.mark.parametrize("seed", range(16))
def test_the_program_finds_what_trying_everything_finds(seed):
    losses, costs, limit = instance(seed)
    picked = choose(losses, costs, limit)
    assert sum(row[i] for row, i in zip(costs, picked, strict=True)) <= limit
    found = math.fsum(row[i] for row, i in zip(losses, picked, strict=True))
    assert found == pytest.approx(every_choice(losses, costs, limit), rel=1e-9, abs=0)


def test_the_limit_is_kept_to_the_last_unit():
    """One part in a billion too much is too much, although the solver's tolerance is a thousand times that."""
    costs = [[10**9, 2 * 10**9 + 1], [1, 2]]
    losses = [[1.0, 0.0], [1e-3, 0.0]]
    assert choose(losses, costs, 2 * 10**9 + 3) == [1, 1]
    assert choose(losses, costs, 2 * 10**9 + 2) == [1, 0]
    assert choose(losses, costs, 2 * 10**9 + 1) == [0, 1]
    assert choose(losses, costs, 10**9 + 1) == [0, 0]


def test_more_budget_is_never_worse():
    losses, costs, _ = instance(7)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    worth = []
    for step in range(13):
        picked = choose(losses, costs, least + (most - least) * step // 12)
        worth.append(math.fsum(row[i] for row, i in zip(losses, picked, strict=True)))
    assert worth == sorted(worth, reverse=True)
    assert worth[-1] == pytest.approx(math.fsum(map(min, losses)))


def test_a_toy_whose_answer_is_known():
    """Equal sizes, losses c * 4^-b: a layer 4^k times as sensitive gets k bits more (reverse water-filling)."""
    losses = [[4.0**k * 4.0**-bits for bits in range(2, 9)] for k in (0, 1, 2, 3)]
    costs = [[100 * bits for bits in range(2, 9)]] * 4
    assert [i + 2 for i in choose(losses, costs, 100 * (2 + 3 + 4 + 5))] == [2, 3, 4, 5]
    assert [i + 2 for i in choose(losses, costs, 100 * (4 + 5 + 6 + 7) + 99)] == [4, 5, 6, 7]


def test_refusals():
    with pytest.raises(PlanishError, match="cost more than 5"):
        choose([[1.0, 0.0]], [[6, 7]], 5)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(PlanishError, match="negative or not finite"):
            choose([[1.0, bad]], [[1, 2]], 5)


def test_what_the_solver_prints_is_not_seen(capfd, monkeypatch):
    import scipy.optimize

    solve = scipy.optimize.milp

    def chatty(*args, **kwargs):
        os.write(1, b"HighsMipSolverData")
        return solve(*args, **kwargs)

    monkeypatch.setattr(scipy.optimize, "milp", chatty)
    print("before")
    choose(*instance(0))
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
