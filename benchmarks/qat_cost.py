"""What a step of each training method costs, in steps of LSQ and of plain training: time, and the most memory.

    python benchmarks/qat_cost.py            # both embedded networks -> benchmarks/qat_cost.csv

A round is one short training of every method, in a new order each time; a method's time is the median over its steps,
and ratios are taken within a round. Times are processor time, which other work on the machine changes little. Memory is
measured in a process for each method: the most that it holds in eight steps of training, less what it held before.
Freed memory stays with the process while times are taken (see step_cost.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from csv_rows import write_rows
from step_cost import KEEP

from planish.data import load_data, make_loader
from planish.flattening import flatten, plain
from planish.models import load_model
from planish.qat import METHODS, QATSettings, train_quantized
from planish.training import TrainingSettings

PLAIN = "plain"
ARMS = (PLAIN, *METHODS)


class Trainings:
    """A network and a few batches of its images, to train on by any method."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.loaded, self.scheme = load_model(name), args.scheme
        data = load_data(None, self.loaded.preprocessing)
        loader = make_loader(data.train, args.batch_size, shuffle=True, seed=0, augment=True, drop_last=True)
        self.batches = list(itertools.islice(loader, args.steps))
        self.calibration = [images for images, _ in self.batches[:4]]

    def __call__(self, arm: str, steps: int) -> list[float]:
        """Seconds of the processor for every step but the first two of one training."""
        batches, times = self.batches[:steps], [time.process_time()]
        training = TrainingSettings(epochs=1, freeze_batchnorm=False)

        def tick(*_: Any) -> None:
            times.append(time.process_time())

        if arm == PLAIN:
            flatten(
                self.loaded.model, batches, settings=plain(training, averaging=QATSettings.averaging), progress=tick
            )
        else:
            settings = QATSettings(training=training, reestimate_batches=1)
            train_quantized(
                self.loaded.model, batches, self.scheme, arm, calibration=self.calibration, settings=settings,
                progress=tick,
            )  # fmt: skip
        return [after - before for before, after in itertools.pairwise(times)][2:]


def peak(name: str, arm: str, args: argparse.Namespace) -> float:
    """Megabytes that a training takes beside what the process held before it (Linux)."""
    trainings = Trainings(name, args)
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _status("VmRSS")
    trainings(arm, 8)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A figure of this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def peaks(name: str, args: argparse.Namespace) -> dict[str, float]:
    """The same for every method, each in its own process."""
    found = {}
    for arm in ARMS:
        command = [sys.executable, __file__, "--models", name, "--peak", arm, "--batch-size", str(args.batch_size),
                   "--scheme", args.scheme, "--threads", str(args.threads)]  # fmt: skip
        env = {key: value for key, value in os.environ.items() if key not in KEEP}
        found[arm] = float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    return found


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network."""
    memory, trainings = peaks(name, args), Trainings(name, args)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_ in range(args.rounds + 1):
        for arm in random.Random(round_).sample(ARMS, len(ARMS)):
            seconds = statistics.median(trainings(arm, args.steps))
            if round_:  # the first round warms up
                times[arm].append(seconds)
    rows = []
    for arm in ARMS:
        over = {
            base: sorted(a / b for a, b in zip(times[arm], times[base], strict=True)) for base in (PLAIN, "lsq")
        }  # fmt: skip
        rows.append({
            "model": name, "method": arm, "scheme": args.scheme,
            "ms_per_step": round(1e3 * statistics.median(times[arm]), 1),
            "of_plain": round(statistics.median(over[PLAIN]), 2), "of_lsq": round(statistics.median(over["lsq"]), 2),
            "of_lsq_min": round(over["lsq"][0], 2), "of_lsq_max": round(over["lsq"][-1], 2),
            "peak_mb": round(memory[arm]), "peak_of_plain": round(memory[arm] / memory[PLAIN], 2),
            "rounds": args.rounds, "steps": args.steps, "batch_size": args.batch_size, "threads": args.threads,
            "torch": torch.__version__,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--scheme", default="w2a2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help="only print the memory of this method, in MB")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.models[0], args.peak, args))
        return
    if not KEEP.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    write_rows(args.out, [row for name in args.models for row in measure(name, args)])


if __name__ == "__main__":
    main()
