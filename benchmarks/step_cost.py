"""What a step of each arm costs, in plain steps: alternating blocks in one process, the median of the ratios.

    python benchmarks/step_cost.py            # both embedded networks -> benchmarks/step_cost.csv

Freed memory stays with the process (two settings of glibc, which the script gives itself): four networks in turn would
otherwise make it go back to the system and come again, page by page, at a cost that no arm has alone.

A block is as many steps as lie between two measurements of the quantization error, so that every block of the flat arm
pays for exactly one. The arms take turns in a new order each round; the ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from csv_rows import write_rows

from planish.data import load_data, make_loader
from planish.flattening.recipe import make_ingredients
from planish.models import load_model
from planish.network import assign, watch
from planish.network.batches import first_image
from planish.recipes.arms import arm_settings
from planish.recipes.config import NoiseOptions, RunConfig, TrainOptions
from planish.training import make_accelerator
from planish.training.engine import make_optimizer
from planish.training.loop import Run
from planish.training.shares import Share
from planish.training.step import Stepper

KEEP = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
ARMS = ("tuned", "averaged", "sam", "flat")


def stepper(arm: str, model: torch.nn.Module, batch: object, schemes: list[str]) -> tuple[Stepper, int]:
    """One arm, ready to step, and the steps between two measurements."""
    settings = arm_settings(arm, TrainOptions(), NoiseOptions(), seed=0)
    assert settings is not None
    twin = copy.deepcopy(model)
    accelerator = make_accelerator()
    watched = watch(twin, first_image(batch))
    ingredients = make_ingredients(settings, model, [assign(watched, scheme) for scheme in schemes])
    optimizer, peak = make_optimizer(twin, settings.training)
    run = Run(twin, twin, accelerator, settings.training, 10**6, None)
    for ingredient in ingredients:
        ingredient.start(run)
    made = Stepper(run, optimizer, peak, ingredients)
    made.set_modes()
    return made, settings.refresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit", "convnet"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--schemes", nargs="+", default=list(RunConfig.schemes))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models:
        loaded = load_model(name)
        data = load_data(None, loaded.preprocessing)
        loader = make_loader(data.train, args.batch_size, shuffle=True, seed=0, augment=True, drop_last=True)
        batches = list(itertools.islice(loader, 20))
        arms = {arm: stepper(arm, loaded.model, batches[0][0], args.schemes) for arm in ARMS}
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for round_ in range(args.rounds + 1):
            for arm in random.Random(round_).sample(ARMS, len(ARMS)):
                step, block = arms[arm]
                began = time.perf_counter()
                for i in range(block):
                    step(Share.all_of(batches[i % len(batches)]))
                    step.run.step += 1
                if round_:  # the first round warms up
                    times[arm].append((time.perf_counter() - began) / block)
        for arm in ARMS:
            ratios = sorted(a / b for a, b in zip(times[arm], times["tuned"], strict=True))
            row = {
                "model": name, "arm": arm, "ms_per_step": round(1e3 * statistics.median(times[arm]), 2),
                "ratio": round(statistics.median(ratios), 3), "ratio_min": round(ratios[0], 3),
                "ratio_max": round(ratios[-1], 3), "rounds": args.rounds, "steps_per_block": block,
                "batch_size": args.batch_size, "threads": args.threads, "torch": torch.__version__,
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
