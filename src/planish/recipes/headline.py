"""The number that a report puts first, and how much each measure told in the study of this project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Spearman's rank correlation between each measure and the points of top-1 that calibrated rounding to w3a3 costs, over
# the networks of benchmarks/flatness.csv: 48 convolutional ones, 37 transformers. 1: it orders networks perfectly.
STUDIED = "w3a3"
RANKS: dict[str, tuple[float, float]] = {
    "imitated": (0.76, 0.89), "rounding": (0.91, 0.48), "sam": (0.10, 0.01), "asam": (0.08, 0.01),
    "worst": (0.20, 0.09), "weight_noise": (0.21, 0.42), "activation_noise": (0.17, 0.25), "trace": (0.04, 0.23),
    "eigenvalue": (0.00, 0.33), "loss": (-0.30, -0.42), "both": (0.89, 0.90),
}  # fmt: skip
NAME = "divergence under imitated rounding"


def headline(scheme: str, networks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The best measure's value for each network, and what the others tell, for ``results["flatness"]``."""
    values = {
        name: prediction["divergence"]
        for name, found in networks.items()
        for prediction in found["prediction"]
        if prediction["scheme"] == scheme
    }
    conv, vit = RANKS["imitated"]
    return {
        "name": NAME,
        "text": (
            f"KL divergence in nats for an image between the network and the network whose rounding to {scheme} is "
            f"imitated by a gain and noise. Of the measures of sharpness here it was the one that ordered networks of "
            f"both kinds best by what {STUDIED} costs them (rank correlation {conv:.2f} on convolutional networks, "
            f"{vit:.2f} on transformers); the last column has the same for the others."
        ),
        "values": values,
        "ranks": {key: f"{first:.2f} / {second:.2f}" for key, (first, second) in RANKS.items()},
    }
