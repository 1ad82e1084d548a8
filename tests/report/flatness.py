"""A made-up diagnosis with everything in it. No number here was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

LAYERS = (
    "attn.qkv.linear",
    "attn.attention_qk",
    "attn.attention_av",
    "attn.proj.linear",
    "mlp.fc1.linear",
    "mlp.fc2.linear",
)
VERDICTS = ("uniform", "uniform", "gaussian", "uniform", "clipped", "degenerate")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def fake_flatness(
    networks: Sequence[str] = ("given", "flat"), blocks: int = 6, depth: str = "blocks"
) -> dict[str, Any]:
    """A diagnosis of these networks, each sharper than the next one, with ``blocks`` transformer blocks."""
    found = {}
    for number, name in enumerate(networks):
        found[name] = _network(Random(number), 1 / (1 + 0.7 * number), blocks, depth)
    return {
        "scheme": "w4a4",
        "images": 512,
        "labelled": True,
        "headline": {
            "name": "rise of the loss along the rounding",
            "text": "How much the loss rises when every weight goes the way that rounding will take it; over the arms "
            "of this project it ranks networks as their accuracy at w4a4 does (rank correlation 0.91).",
            "values": {name: found[name]["split"]["weights"] for name in networks},
        },
        "networks": found,
        "advice": [
            {"product": f"{depth}.3.attn.proj.linear", "gain": 0.008, "bytes": 12288,
             "text": f"{depth}.3.attn.proj loses most; keep it at 8 bits for +0.8 points and 12 kB."},
            {"site": f"{depth}.2.mlp.fc2.input", "gain": 0.003, "bytes": 0,
             "text": f"The input of {depth}.2.mlp.fc2 is clipped; set its range from more images."},
        ],
    }  # fmt: skip


def _network(random: Random, sharp: float, blocks: int, depth: str) -> dict[str, Any]:
    products = [
        "patch_embed.proj.conv2d",
        *(f"{depth}.{i}.{layer}" for i in range(blocks) for layer in LAYERS),
        "head.linear",
    ]
    weights, activations = 0.22 * sharp, 0.31 * sharp**2
    return {
        "fp_top1": 0.9 - 0.01 * (1 - sharp),
        "loss": 0.31 + 0.03 * (1 - sharp),
        "errors": {"sites": _sites(random, products), "correlations": _correlations(sharp)},
        "split": {
            "loss": 0.31 + 0.03 * (1 - sharp), "weights": weights, "activations": activations,
            "interaction": 0.05 * sharp, "both": weights + activations + 0.05 * sharp, "error": 0.02,
            "weights_error": 0.01, "activations_error": 0.015, "interaction_error": math.nan,
            "taylor_weights": 0.8 * weights, "taylor_activations": 1.2 * activations,
            "layers": [_damage(random, product, sharp) for product in products],
        },
        "curvature": {
            "trace": {"value": 812.0 * sharp, "error": 31.0 * sharp},
            "eigenvalues": [91.2 * sharp / (1 + 0.5 * i) for i in range(10)],
            "density": _density(sharp),
            "layers": [_trace(random, product, sharp) for product in products],
            "images": 512,
            "probes": 64,
        },
        "sharpness": _sharpness(sharp),
        "landscape": _landscape(random, sharp),
        "prediction": [_prediction(scheme, lost * sharp) for scheme, lost in SCHEMES.items()],
        "damage": _beyond(random, sharp),
    }  # fmt: skip


SCHEMES = {"w8a8": 0.002, "w6a6": 0.006, "w4a4": 0.031, "w3a3": 0.15, "w2a4": 0.42}


def _sites(random: Random, products: Sequence[str]) -> list[dict[str, Any]]:
    sites = []
    for product in products:
        owner = product.rpartition(".")[0] if product.endswith(("linear", "conv2d")) else product
        names = ("weight", "input") if owner != product else ("query", "key")
        for name in names:
            role = name if name in ("weight", "input") else "operand"
            verdict = VERDICTS[random.randrange(len(VERDICTS))]
            step = 0.01 * (1 + random.random())
            wide = {"uniform": 1.0, "gaussian": 1.05, "clipped": 2.6, "degenerate": 0.2}[verdict]
            sites.append({
                "site": f"{owner}{'_' if role == 'operand' else '.'}{name}", "role": role, "bits": 4, "count": 65536,
                "mean": 1e-5 * random.random(), "variance": wide * step**2 / 12, "step": step, "variance_ratio": wide,
                "clipped": 0.04 if verdict == "clipped" else 0.0, "zeros": 0.3 * random.random(),
                "kurtosis": -1.2 * wide, "distance_gaussian": 0.1 * random.random(), "crowding": 0.2,
                "distance_uniform": 0.05 * random.random(), "verdict": verdict,
                "histogram": _histogram(random, verdict),
            })  # fmt: skip
    return sites


def _histogram(random: Random, verdict: str, bins: int = 40) -> dict[str, list[float]]:
    """In steps, as all histograms are."""
    edges = [-1 + 2 * i / bins for i in range(bins + 1)]
    centres = [(a + b) / 2 for a, b in pairwise(edges)]
    sigma = 12**-0.5
    gaussian = [math.exp(-0.5 * (x / sigma) ** 2) / sigma / math.sqrt(2 * math.pi) for x in centres]
    uniform = [1.0 if abs(x) < 0.5 else 0.0 for x in centres]
    law = gaussian if verdict == "gaussian" else uniform
    density = [value * (1 + 0.08 * (random.random() - 0.5)) for value in law]
    if verdict == "clipped":
        density = [value + 0.3 * math.exp(-abs(x)) for value, x in zip(density, centres, strict=True)]
    return {"edges": edges, "density": density, "gaussian": gaussian, "uniform": uniform}


def _correlations(sharp: float) -> dict[str, Any]:
    return {
        "weight_activation": {"value": 0.004 * sharp, "chance": 0.006},
        "channels": {"value": 0.051, "chance": 0.012},
        "layers": {"value": 0.018, "chance": 0.011},
    }


def _trace(random: Random, product: str, sharp: float) -> dict[str, Any]:
    layer = product.rpartition(".")[0] + ".weight"
    return {"layer": layer, "weights": 4096, "trace": 40 * sharp * random.random(), "error": 2.0}


def _damage(random: Random, product: str, sharp: float) -> dict[str, Any]:
    size = 0.03 * sharp * random.random() ** 3
    return {
        "product": product, "macs": 401408, "weights": 0.4 * size, "activations": 0.5 * size, "interaction": 0.1 * size,
        "both": size - 0.0005, "taylor_weights": 0.35 * size, "taylor_activations": 0.6 * size,
    }  # fmt: skip


def _density(sharp: float) -> dict[str, list[float]]:
    xs = [-10 + 110 * i / 100 for i in range(101)]
    tops = [91.2 * sharp / (1 + 0.5 * i) for i in range(10)]
    ys = [math.exp(-0.5 * (x / 1.5) ** 2) + 1e-4 * sum(math.exp(-0.5 * ((x - t) / 1.0) ** 2) for t in tops) for x in xs]
    return {"x": xs, "y": ys}


def _sharpness(sharp: float) -> dict[str, Any]:
    path = [
        {"t": t, "loss": 0.31 + 0.22 * sharp * t**2, "error": 0.01, "top1": 0.9 - 0.05 * sharp * t**2}
        for t in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    ]
    sigmas = (0.125, 0.25, 0.5, 1.0, 2.0)
    return {
        "rounding": path,
        "rounding_low_bit": [{**point, "loss": point["loss"] + 0.3 * sharp**2} for point in path],
        "weight_noise": [{"sigma": s, "loss": 0.31 + 2.5 * sharp * s**2, "error": 0.1 * s} for s in sigmas],
        "activation_noise": [{"sigma": s, "loss": 0.31 + 0.4 * sharp * s**2, "error": 0.02 * s} for s in sigmas],
        "sam": {"rho": 0.05, "increase": 0.11 * sharp, "error": 0.004},
        "asam": {"rho": 0.5, "increase": 0.19 * sharp, "error": 0.011},
        "worst": {"rho": 0.5, "increase": 0.92 * sharp, "error": 0.031},
    }


def _landscape(random: Random, sharp: float) -> dict[str, Any]:
    steps = [-1 + 0.25 * i for i in range(9)]
    tilt = random.random()
    return {
        "line": [{"t": t, "loss": 0.31 + 2.1 * sharp * t**2, "error": 0.05 * abs(t)} for t in steps],
        "plane": {
            "a": steps, "b": steps,
            "loss": [[0.31 + 2.1 * sharp * (a * a + (1 + tilt) * b * b + tilt * a * b) for b in steps] for a in steps],
        },
    }  # fmt: skip


def _prediction(scheme: str, lost: float) -> dict[str, Any]:
    return {
        "scheme": scheme, "loss": 0.31 + 3 * lost, "top1": 0.9 - lost, "low": 0.9 - 1.4 * lost,
        "high": 0.9 - 0.7 * lost, "measured_top1": 0.9 - 1.1 * lost if scheme != "w6a6" else None,
    }  # fmt: skip


def _beyond(random: Random, sharp: float) -> dict[str, Any]:
    kinds = {"noise": 0.11, "blur": 0.07, "contrast": 0.05, "jpeg": 0.02}
    return {
        "flips": 0.071 * sharp, "ece_float": 0.021, "ece_low_bit": 0.021 + 0.03 * sharp,
        "classes": [
            {"name": c, "images": 200, "float": 0.9, "low_bit": 0.91 - 0.09 * sharp * random.random()} for c in CLASSES
        ],
        "corruptions": [
            {"kind": kind, "strength": s, "float": 0.9 - lost * s, "low_bit": 0.87 - (1 + 0.4 * sharp) * lost * s}
            for kind, lost in kinds.items() for s in range(1, 6)
        ],
    }  # fmt: skip
