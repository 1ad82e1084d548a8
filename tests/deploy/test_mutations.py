"""A small part of ``benchmarks/checkpoint_mutations.py``: nothing but refusals and right models."""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest

from benchmarks.checkpoint_mutations import KINDS, bases, outcomes, shortened


@pytest.mark.skipif(sys.platform == "win32", reason="the watch uses SIGPROF")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_damaged_and_hostile_files_are_refused(tmp_path):
    found = Counter()
    for outcome in outcomes(300, 7, tmp_path):
        assert not outcome.wrong, outcome
        found[outcome.kind, outcome.result == "loaded"] += 1
    assert {kind for kind, _ in found} == set(KINDS)
    assert sum(n for (_, loaded), n in found.items() if not loaded) > 200


def test_the_mutations_are_those_of_a_seed(tmp_path):
    base = bases(tmp_path)[0]
    for mutate, _ in KINDS.values():
        assert mutate(base, random.Random(3)) == mutate(base, random.Random(3))
    assert shortened(f"{tmp_path}: has 'x' at 3 (so)", tmp_path) == "has ... at N"
