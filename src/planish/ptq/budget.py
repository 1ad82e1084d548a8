"""A budget of bytes or bit operations, and the integer program that chooses one option for each layer within it.

The program is that of HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680, section 3.4) and of Hubara et al. 2020
(arXiv:2006.10518, section 3.3): one width for each layer, the least sum of the layers' losses, their costs within the
budget. It takes the loss of the network for the sum of what each layer costs alone.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from planish.errors import PlanishError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Budget:
    """How much a quantized network may cost.

    Attributes:
        kind: "bytes" (weights at their bits, scales, the rest in float), "share" of the bytes of the float network, or
            "bops": bit operations for one image, multiply-accumulates times the bits of both operands.
        amount: bytes, share or bit operations.
    """

    kind: str
    amount: float

    @staticmethod
    def parse(text: str | Budget) -> Budget:
        """Read "0.9MB", "450kB", "900000" (bytes; k = 10^3, M = 10^6), "0.13x" (of the float size) or "2.5Gbops".

        Raises:
            PlanishError: the text is none of these, or the amount is not above 0.
        """
        if isinstance(text, Budget):
            return text
        pattern = r"([0-9]*\.?[0-9]+|[0-9]+\.)\s*(?:([kmgt]?)(b|bops)?|(x))"
        match = re.fullmatch(pattern, text.strip(), re.IGNORECASE | re.ASCII) if isinstance(text, str) else None
        if match is None or (match[2] and not match[3]) or float(match[1]) <= 0:
            raise PlanishError(
                f"budget {text!r} is not understood: write a size such as 0.9MB, 450kB or 900000 (bytes), 0.13x (of "
                f"the size in float), or bit operations such as 2.5Gbops"
            )
        amount = float(match[1])
        if match[4]:
            return Budget("share", amount)
        kind = "bops" if (match[3] or "").lower() == "bops" else "bytes"
        return Budget(kind, amount * _UNITS[(match[2] or "").lower()])

    def describe(self) -> str:
        """As it would be written."""
        return f"{self.amount:g}x" if self.kind == "share" else say_cost(self.amount, self.kind)


def say_cost(amount: float, kind: str, *, up: bool = False) -> str:
    """Bytes or bit operations in four digits, rounded to nearest or ``up``: ``"91.24 kB"``, ``"2.5 Gbops"``."""
    word = "bops" if kind == "bops" else "B"
    power = max(0, min(4, math.floor(math.log10(max(amount, 1)) / 3)))
    scaled = amount / 1e3**power
    digits = 3 - math.floor(math.log10(max(scaled, 1)))
    if up:
        scaled = math.ceil(round(scaled * 10**digits, 6)) / 10**digits
    return f"{scaled:.{digits}f}".rstrip("0").rstrip(".") + f" {['', 'k', 'M', 'G', 'T'][power]}{word}"


def choose(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: int) -> list[int]:
    """One option for each layer: the least sum of losses among the choices whose costs sum to at most ``limit``.

    Args:
        losses: for each layer the loss of each of its options, finite and not negative.
        costs: for each layer the cost of each of its options, in whole units.

    Returns:
        The index of the chosen option, by layer.

    Raises:
        PlanishError: the cheapest options together cost more than ``limit``, or a loss is negative or not finite.
    """
    if not all(math.isfinite(loss) and loss >= 0 for row in losses for loss in row):
        raise PlanishError("a loss is negative or not finite: the sensitivity of a layer is a number from 0 on")
    chosen = [row.index(min(row)) for row in map(list, costs)]
    if sum(row[i] for row, i in zip(costs, chosen, strict=True)) > limit:
        raise PlanishError(f"the cheapest options cost more than {limit}")

    def total(choice: Sequence[int]) -> float:
        return math.fsum(row[i] for row, i in zip(losses, choice, strict=True))

    # The solver's tolerances are absolute. An option that loses more than the whole of a choice that is known is not in
    # the best one; without such options the scale can be that of the result, so the program is solved twice.
    for _ in range(2):
        most = total(chosen)
        found = _solve(losses, costs, limit, most)
        if total(found) <= most:
            chosen = found
    return chosen


@contextmanager
def _silent() -> Iterator[None]:
    """The solver (HiGHS in scipy 1.17) prints a line of its own now and then, past ``sys.stdout`` and its options."""
    try:
        flush = ctypes.CDLL(None).fflush
        sys.stdout.flush()
        flush(None)
        kept = os.dup(1)
    except (OSError, TypeError, AttributeError, ValueError):  # another system, or no output to keep clean
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _solve(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: int, most: float) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, because it takes a while to import
    from scipy.sparse import csr_array

    layer = np.repeat(np.arange(len(losses)), [len(row) for row in losses])
    loss = np.array([value for row in losses for value in row], float)
    cost = np.array([value for row in costs for value in row], float)
    one_each = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    unit = max(limit, 1)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None] / unit, ub=limit / unit)]
    while True:
        with _silent():
            answer: Any = milp(
                1e3 * np.minimum(loss, most) / (most or 1.0),
                constraints=constraints,
                integrality=np.ones(len(layer)),
                bounds=Bounds(0, (loss <= most).astype(float)),
                options={"mip_rel_gap": 0.0},
            )
        if answer.x is None:
            raise PlanishError(f"the integer program over the bits found no answer: {answer.message}")
        picked = [int(np.argmax(answer.x[layer == i])) for i in range(len(losses))]
        taken = [row[i] for row, i in zip(costs, picked, strict=True)]
        if sum(taken) <= limit:
            return picked
        # The solver holds the limit to one part in a million only. What costs as much in every layer is too much too.
        as_much = np.array([float(value >= least) for row, least in zip(costs, taken, strict=True) for value in row])
        constraints.append(LinearConstraint(as_much[None], ub=len(losses) - 1))
