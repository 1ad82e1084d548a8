"""The public names, and that they cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import planish

NAMES = [
    "FlattenSettings", "Format", "PlanishError", "Preprocessing", "QATSettings", "Scheme", "TrainingSettings",
    "__version__", "calibration_subset", "evaluate", "export", "flatten", "ledger", "load", "load_data", "load_model",
    "make_loader", "quantize", "save", "train",
]  # fmt: skip


def test_the_public_names_are_these():
    assert planish.__all__ == NAMES == dir(planish)
    for name in NAMES:
        assert getattr(planish, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        planish.absent  # noqa: B018
    assert planish.__version__ == version("planish")


def test_importing_costs_nothing():
    program = "import sys, planish; print([name for name in ('torch', 'numpy', 'timm', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0)
