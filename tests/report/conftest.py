"""Made-up results for the report's tests. No number here was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from planish.report.html import render_report
from tests.report.flatness import fake_flatness

TOP1 = {
    "given": {"fp32": 0.912, "w4a4": 0.861, "w3a3": 0.702, "w2a4": 0.214},
    "tuned": {"fp32": 0.915, "w4a4": 0.868, "w3a3": 0.744, "w2a4": 0.310},
    "averaged": {"fp32": 0.919, "w4a4": 0.884, "w3a3": 0.807, "w2a4": 0.402},
    "flat": {"fp32": 0.917, "w4a4": 0.896, "w3a3": 0.851, "w2a4": 0.598},
}


def fake_results(seeds: int = 1, methods: tuple[str, ...] = ("rtn",)) -> dict[str, Any]:
    """Four arms, four schemes; w2a4 of ``given`` was not measured."""
    rows = []
    for arm, by_scheme in TOP1.items():
        for seed in range(seeds if arm != "given" else 1):
            for number, method in enumerate(methods):
                for scheme, top1 in by_scheme.items():
                    if (scheme == "fp32" and number > 0) or (arm == "given" and scheme == "w2a4"):
                        continue
                    row: dict[str, Any] = {
                        "arm": arm,
                        "scheme": scheme,
                        "method": "none" if scheme == "fp32" else method,
                        "seed": seed,
                    }
                    row |= {"fp_top1": by_scheme["fp32"], "top1": top1 + 0.004 * (seed - (seeds - 1) / 2)}
                    row["top1"] += 0.01 * number if scheme != "fp32" else 0
                    rows.append(row | {"nll": 0.41, "ece": 0.021, "seconds": 12.5})
    return {
        "protocol": {
            "model": "test-vit (made-up numbers)",
            "data": "fashion-mnist",
            "weights_hash": "0123456789abcdef",
            "calibration_images": 1024,
            "calibration_seed": 0,
            "weights": "symmetric, per channel, mse",
            "activations": "affine, per tensor, mse",
            "first_and_last_layer_bits": 8,
            "stays_in_float": ["layer norms", "softmax", "residual sums"],
            "epochs": 2,
            "labels_used": True,
        },
        "environment": {"python": "3.11.7", "torch": "2.6.0", "device": "cpu", "threads": 1, "os": "Test OS"},
        "rows": rows,
        "flatness": {},
    }


def fake_ledger() -> list[dict[str, Any]]:
    sites = ["patch_embed.proj", *(f"blocks.{i}.{n}" for i in range(3) for n in ("attn.qkv", "mlp.fc1", "attn.q@k"))]
    rows = [{"site": s, "operator": "linear", "bits": "4", "granularity": "channel", "share": 0.0987} for s in sites]
    return [*rows, {"site": "norm", "operator": "layer_norm", "bits": None, "granularity": None, "share": None}]


@pytest.fixture
def fake() -> Callable[..., dict[str, Any]]:
    return fake_results


@pytest.fixture
def ledger() -> list[dict[str, Any]]:
    return fake_ledger()


@pytest.fixture(scope="session")
def diagnosed() -> str:
    """The page of a run with a diagnosis of two networks."""
    return render_report({**fake_results(3), "flatness": fake_flatness(), "ledger": fake_ledger()})
