"""Run by test_curvature.py in two processes, which print what they found, and in the process of the test."""

from __future__ import annotations

import dataclasses
import json
import os

from planish.flatness.curvature import curvature
from planish.recipes.processes import leave_group
from planish.training.engine import make_accelerator
from tests.flatness.networks import attention_net, images


def main() -> dict:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = attention_net()
    accelerator = make_accelerator()
    found = {"world": accelerator.num_processes}
    shared = images(model)[rank::world]  # batches of 16, 16 and 8: 24 images for the first of two, 16 for the second
    lonely = images(model) if rank == 0 else []  # and all for the first one
    for name, batches in (("shared", shared), ("lonely", lonely)):
        measured = curvature(model, batches=batches, probes=4, steps=40, exact=0, accelerator=accelerator)
        found[name] = dataclasses.asdict(measured)
    leave_group()
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
