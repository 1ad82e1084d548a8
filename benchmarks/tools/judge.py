"""What every tool is given, and how its result is judged.

Each tool runs in an environment of its own, so this file imports torch, timm and safetensors alone. A runner
(``run_TOOL.py``) hands its methods to :func:`main`; ``compare.py`` starts it once for each row::

    python run_TOOL.py --material MATERIAL.safetensors --method NAME --weights 4 --activations 4

and reads the last line of what it prints: a JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

BATCH = 128  # of calibration; the methods choose their own for what they learn


@dataclass
class Task:
    """A network to quantize. Weights have a scale for each output channel, the inputs of layers one scale each; the
    first and the last layer keep 8 bits for both."""

    model: nn.Module
    calibration: Tensor  # images, (512, 1, 28, 28), normalized; no labels
    weights: int  # bits
    activations: int
    seed: int

    @property
    def batches(self) -> list[Tensor]:
        """The calibration images in batches."""
        return list(self.calibration.split(BATCH))

    @property
    def edges(self) -> tuple[str, str]:
        """Names of the first and the last layer."""
        layers = [name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        return layers[0], layers[-1]


Answer = Callable[[Tensor], Tensor]  # the quantized network: images to logits
Method = Callable[[Task], Answer]


def read(path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The float network and the images of a material file."""
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    model = timm.create_model(recipe["architecture"], pretrained=False, **recipe["arguments"])
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    model.load_state_dict(state)
    return model.eval(), tensors


def main(methods: dict[str, Method], packages: tuple[str, ...]) -> None:
    """Quantize by one of the methods and print what came out; ``packages`` are those whose versions are told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--material", type=Path, required=True)
    parser.add_argument("--method", choices=list(methods), required=True)
    parser.add_argument("--weights", type=int, required=True, help="bits")
    parser.add_argument("--activations", type=int, required=True, help="bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tensors = read(args.material)
    exact = _logits(model, tensors["test"])
    task = Task(model, tensors["calibration"], args.weights, args.activations, args.seed)
    began = time.process_time()  # of the processor: what else the machine does hardly counts
    answer = methods[args.method](task)
    seconds = time.process_time() - began
    logits, labels = _logits(answer, tensors["test"]), tensors["test_labels"]
    print(json.dumps({**_judge(logits, exact, labels), "seconds": round(seconds, 1), "versions": _versions(packages)}))


@torch.no_grad()
def _logits(answer: Answer | nn.Module, images: Tensor) -> Tensor:
    return torch.cat([answer(batch).float() for batch in images.split(500)])


def _judge(logits: Tensor, exact: Tensor, labels: Tensor) -> dict[str, Any]:
    chosen, before = logits.argmax(1), exact.argmax(1)
    return {
        "fp_top1": round(float((before == labels).float().mean()), 5),
        "top1": round(float((chosen == labels).float().mean()), 5),
        "agreement": round(float((chosen == before).float().mean()), 5),
    }


def _versions(packages: tuple[str, ...]) -> str:
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in (*packages, "torch"))
