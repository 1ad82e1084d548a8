"""What an LSQ step costs here and in Brevitas, on the same network: alternating steps in one process.

    pip install brevitas                  # in an environment of its own, beside planish
    python benchmarks/brevitas_step.py    # -> benchmarks/brevitas_step.csv

Both train the embedded networks with a learned scale for every output channel of a weight and one for every layer's
input, first and last layer at 8 bits. Brevitas quantizes layers only, so planish leaves the attention products of the
transformer in float here. Freed memory stays with the process, see ``step_cost.py``.
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
from typing import Any

import torch
from csv_rows import write_rows
from step_cost import KEEP
from torch import nn

from planish.data import load_data, make_loader
from planish.models import load_model
from planish.network import assign, watch
from planish.network.batches import first_image
from planish.qat import Method
from planish.qat.prepare import insert_quantizers
from planish.qat.upkeep import Upkeep
from planish.training import TaskLoss, TrainingSettings, make_accelerator
from planish.training.engine import make_optimizer
from planish.training.loop import Run
from planish.training.shares import Share
from planish.training.step import Stepper

SETTINGS = TrainingSettings(freeze_batchnorm=False)


def stepper(model: nn.Module, ingredients: list[Any]) -> Stepper:
    """The same loop for all three."""
    optimizer, peak = make_optimizer(model, SETTINGS)
    made = Stepper(Run(model, model, make_accelerator(), SETTINGS, 10**6, None), optimizer, peak, ingredients)
    made.set_modes()
    return made


def ours(model: nn.Module, inputs: Any, bits: int) -> Stepper:
    twin = copy.deepcopy(model)
    watched = watch(twin, first_image(inputs))
    attention = sorted({p.module for p in watched.products if p.operator.startswith("attention")})
    plan = assign(watched, f"w{bits}a{bits}", allow=[f"{path}.attention_*" for path in attention])
    taps = insert_quantizers(twin, [inputs], plan, Method())
    return stepper(twin, [TaskLoss(), Upkeep(taps)])


def theirs(model: nn.Module, inputs: Any, bits: int) -> Stepper:
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    twin = copy.deepcopy(model)
    layers = [(name, m) for name, m in twin.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, layer in layers:
        width = 8 if name in (layers[0][0], layers[-1][0]) else bits

        class Weight(Int8WeightPerChannelFloat):
            bit_width = width
            scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

        class Input(Int8ActPerTensorFloat):  # its scale is a parameter, set from the first batches
            bit_width = width
            collect_stats_steps = 2

        options = {"weight_quant": Weight, "input_quant": Input, "bias": layer.bias is not None}
        if isinstance(layer, nn.Conv2d):
            new = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
                dilation=layer.dilation, groups=layer.groups, **options,
            )  # fmt: skip
        else:
            new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        new.load_state_dict(layer.state_dict(), strict=False)
        parent, _, last = name.rpartition(".")
        setattr(twin.get_submodule(parent), last, new)
    made = stepper(twin, [TaskLoss()])
    made.set_modes()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    import brevitas

    torch.set_num_threads(args.threads)
    rows = []
    for name in args.networks:
        loaded = load_model(name)
        data = load_data(None, loaded.preprocessing)
        loader = make_loader(data.train, args.batch_size, shuffle=True, seed=0, augment=True, drop_last=True)
        batches = list(itertools.islice(loader, 20))
        arms = {
            "float": stepper(copy.deepcopy(loaded.model), [TaskLoss()]),
            "planish": ours(loaded.model, batches[0][0], args.bits),
            "brevitas": theirs(loaded.model, batches[0][0], args.bits),
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for i in range(args.steps + 20):
            for arm in random.Random(i).sample(list(arms), len(arms)):
                began = time.perf_counter()
                arms[arm](Share.all_of(batches[i % len(batches)]))
                arms[arm].run.step += 1
                if i >= 20:  # the first steps warm up and set Brevitas' scales
                    times[arm].append(time.perf_counter() - began)
        for arm in arms:
            ratios = sorted(a / b for a, b in zip(times[arm], times["float"], strict=True))
            rows.append({
                "network": name, "arm": arm, "bits": args.bits,
                "ms_per_step": round(1e3 * statistics.median(times[arm]), 2),
                "ratio": round(statistics.median(ratios), 3), "ratio_q1": round(ratios[len(ratios) // 4], 3),
                "ratio_q3": round(ratios[3 * len(ratios) // 4], 3), "steps": args.steps, "batch_size": args.batch_size,
                "threads": args.threads, "torch": torch.__version__, "brevitas": brevitas.__version__,
            })  # fmt: skip
            print(rows[-1], flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
