"""What share of a training step goes into anything but forward, backward and optimizer: noise, recorders, bookkeeping.

    python benchmarks/step_overhead.py                                # one process -> benchmarks/step_overhead.csv
    torchrun --nproc-per-node 4 benchmarks/step_overhead.py           # four; rows of other numbers of processes stay

The step of planish's loop against a bare one with the same network, batches, optimizer and clipping of the gradient
(and DistributedDataParallel, where there are several processes): nothing but forward, backward and the optimizer. What
is counted is processor time, the mean over the processes, which other work on the machine disturbs least; waiting is
not in it.

The arms take turns with every step, in a new order each time. A round has as many steps as lie between two
measurements of the quantization error; the share is taken within a round, the median over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from csv_rows import write_rows
from torch import nn

from planish.data import load_data, make_loader
from planish.flattening import FlattenSettings
from planish.flattening.recipe import make_ingredients
from planish.models import load_model
from planish.network import assign, watch
from planish.network.batches import first_image
from planish.recipes.arms import arm_settings
from planish.recipes.config import NoiseOptions, RunConfig, TrainOptions
from planish.training import TrainingSettings, make_accelerator
from planish.training.engine import make_optimizer
from planish.training.loop import Run
from planish.training.shares import Share
from planish.training.step import Stepper

KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}  # see step_cost.py
ARMS = ("tuned", "averaged", "flat")
BLOCK = FlattenSettings.refresh
Step = Callable[[Any], object]


def bare(model: nn.Module, accelerator: Any) -> Step:
    """Forward, backward, optimizer; BatchNorm frozen and gradients clipped as the loop does by default."""
    twin = copy.deepcopy(model)
    optimizer, _ = make_optimizer(twin, TrainingSettings())
    wrapped, optimizer = accelerator.prepare(twin, optimizer)
    twin.train()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    parameters = [p for p in twin.parameters() if p.requires_grad]

    def step(batch: Any) -> None:
        images, labels = batch
        accelerator.backward(F.cross_entropy(wrapped(images), labels))
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(arm: str, model: nn.Module, accelerator: Any, example: Any, schemes: list[str]) -> Step:
    """A step of an arm in planish's loop."""
    settings = arm_settings(arm, TrainOptions(), NoiseOptions(), seed=0)
    assert settings is not None
    twin = copy.deepcopy(model)
    watched = watch(twin, first_image(example))
    plans = [assign(watched, scheme) for scheme in schemes] if settings.imitates else []
    ingredients = make_ingredients(settings, model, plans)
    optimizer, peak = make_optimizer(twin, settings.training)
    wrapped, optimizer = accelerator.prepare(twin, optimizer)
    run = Run(twin, wrapped, accelerator, settings.training, 10**6, None)
    for ingredient in ingredients:
        ingredient.start(run)
    stepper = Stepper(run, optimizer, peak, ingredients)
    stepper.set_modes()

    def step(batch: Any) -> None:
        count = len(batch[0])
        stepper(Share(batch, count, count * accelerator.num_processes))
        run.step += 1

    return step


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    accelerator = make_accelerator()
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing)
    loader = make_loader(data.train, args.images, shuffle=True, seed=accelerator.process_index, augment=True)
    batches = list(itertools.islice(loader, 20))
    steps = {arm: ours(arm, loaded.model, accelerator, batches[0][0], args.schemes) for arm in ARMS}
    steps["bare"] = bare(loaded.model, accelerator)
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    order = random.Random(0)
    for round_ in range(args.rounds + 1):
        spent = dict.fromkeys(steps, 0.0)
        for i in range(BLOCK):
            for arm in order.sample(sorted(steps), len(steps)):
                began = time.process_time()
                steps[arm](batches[i % len(batches)])
                spent[arm] += time.process_time() - began
        for arm, seconds in spent.items():
            mean = accelerator.reduce(torch.tensor(seconds, dtype=torch.float64), "mean")
            if round_:  # the first round warms up
                times[arm].append(1e3 * float(mean) / BLOCK)
    rows = []
    for arm in ARMS:
        shares = sorted(1 - b / a for a, b in zip(times[arm], times["bare"], strict=True))
        rows.append({
            "model": name, "processes": accelerator.num_processes, "images_per_process": args.images, "arm": arm,
            "bare_ms": round(statistics.median(times["bare"]), 2), "ms": round(statistics.median(times[arm]), 2),
            "outside": round(statistics.median(shares), 4), "outside_min": round(shares[0], 4),
            "outside_max": round(shares[-1], 4), "rounds": args.rounds, "steps_per_round": BLOCK,
            "threads": 1, "torch": torch.__version__,
        })  # fmt: skip
        if accelerator.is_main_process:
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit", "convnet"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=128, help="of each process, in a step")
    parser.add_argument("--schemes", nargs="+", default=list(RunConfig.schemes))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(1)
    rows = [row for name in args.models for row in measure(name, args)]
    if not make_accelerator().is_main_process:
        return
    key = ("processes", "images_per_process", "model")
    known = {tuple(str(row[k]) for k in key) for row in rows}
    before = list(csv.DictReader(args.out.open(newline=""))) if args.out.exists() else []
    rows = [row for row in before if tuple(row[k] for k in key) not in known] + rows
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
