"""Twenty runs, each killed once at a random moment and resumed: is the result that of the undisturbed run?

    python benchmarks/interruption.py [--runs 20] [--seed 0]

A run is ``planish run`` with every stage: the embedded convolutional network on 200 of the embedded images, as given
and flattened with noise on weights and activations, quantized by ``genie``, measured and reported. It is killed by
SIGKILL, SIGTERM or SIGINT when it has used a random share of the processor time of the undisturbed run (from the end of
the imports to the end of the command, one moment in each twentieth), and continued with ``--resume``, or begun again if
nothing was there yet. Compared are results.json without seconds and memory, every tensor and the metadata of every file
of weights, and the names of all files. Writes interruption.csv beside this file.

Commands are forked from a process that has imported everything, which is what takes longest in so small a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

import planish
import planish.cli.run
from planish.cli.main import entry

RUN = [
    "--model", "convnet", "--data", "images", "--arms", "given", "flat", "--schemes", "w4a4", "--methods", "genie",
    "--activation-noise", "gaussian", "--epochs", "2", "--iterations", "20", "--batch-size", "32", "--threads", "1",
    "--calibration-images", "64", "--checkpoint-minutes", "0.02", "--out", "run",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLOCK = ("seconds", "seconds_training", "peak_memory_mb")


def make_images(folder: Path, each: int = 20) -> None:
    """Class folders with some of the embedded training images."""
    data = planish.load_data(None, planish.load_model("convnet").preprocessing)
    for label in range(10):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        chosen = [i for i, known in enumerate(data.train_labels) if known == label][:each]
        for i in chosen:
            pixels = data.train[i][0]
            low, high = pixels.min(), pixels.max()
            grey = ((pixels[0] - low) / (high - low) * 255).byte().numpy()
            Image.fromarray(grey).save(place / f"{i}.png")


def used(process: int) -> float:
    """Processor seconds of a process that runs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(folder: Path, *arguments: str) -> int:
    """The number of a process that does ``planish run`` in a folder; what it says is in out.txt and err.txt there."""
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        for stream, name in ((1, "out.txt"), (2, "err.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout = os.fdopen(1, "w")
        # a shell's background jobs begin with Ctrl-C ignored, and then planish ignores it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["planish", "run", *arguments]
        status = 1
        try:
            entry()
        except SystemExit as end:
            status = int(end.code or 0)
        finally:  # what surrounds this function is the other process's
            sys.stdout.flush()
            os._exit(status)
    return process


def ended(process: int) -> int | None:
    """The status of a process; ``None`` while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def finish(process: int) -> float:
    """Wait until a process has ended well; its processor seconds, as far as they were seen."""
    seconds = 0.0
    while True:
        with suppress(FileNotFoundError, IndexError):
            seconds = used(process)
        if (status := ended(process)) is not None:
            assert status == 0, status
            return seconds
        time.sleep(0.02)


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def weights(path: Path) -> Any:
    with safe_open(path, framework="np") as file:
        head = {k: v for k, v in (file.metadata() or {}).items() if k != "planish_sha256"}  # of all, seconds too
        head = {k: without_clock(json.loads(v)) if v.startswith("{") else v for k, v in head.items()}
        names = list(file.keys())
        return {name: file.get_tensor(name).tobytes() for name in names}, head


def outcome(folder: Path) -> Any:
    return (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        without_clock(json.loads((folder / "results.json").read_text())),
        {path.name: weights(path) for path in folder.glob("*.safetensors")},
    )


def killed_at(folder: Path, number: signal.Signals, seconds: float) -> tuple[int, str]:
    """The status of a run that is killed then, and its last line before; it may have ended before."""
    process = start(folder, *RUN)
    while (status := ended(process)) is None and used(process) < seconds:
        time.sleep(0.01)
    if status is None:
        os.kill(process, number)
        while (status := ended(process)) is None:
            time.sleep(0.01)
    lines = [line for line in (folder / "out.txt").read_text().splitlines() if line]
    return status, lines[-1].rpartition("] ")[2].partition(",")[0] if lines else "starting"


def measure(runs: int, seed: int, place: Path) -> list[dict[str, Any]]:
    draw, rows = random.Random(seed), []
    make_images(place / "images")

    def fresh(name: str) -> Path:
        folder = place / name
        folder.mkdir()
        (folder / "images").symlink_to(place / "images")
        return folder

    seconds = finish(start(fresh("whole"), *RUN))
    expected = outcome(place / "whole" / "run")
    print(f"undisturbed: {seconds:.1f} processor seconds", flush=True)
    for run in range(runs):
        share, number = (run + draw.random()) / runs, SIGNALS[run % len(SIGNALS)]
        folder = fresh(f"{run}")
        status, last = killed_at(folder, number, share * seconds)
        continued = "resumed" if (folder / ".run.partial").exists() else "begun again"
        if status:
            finish(start(folder, *(["--resume", "--out", "run"] if continued == "resumed" else RUN)))
        rows.append({
            "run": run, "signal": number.name, "share": round(share, 3), "status": status, "last_line": last,
            "continued": continued if status else "had ended", "identical": outcome(folder / "run") == expected,
        })  # fmt: skip
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = measure(arguments.runs, arguments.seed, Path(place))
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{sum(row['identical'] for row in rows)} of {len(rows)} identical")


if __name__ == "__main__":
    main()
