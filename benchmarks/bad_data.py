"""What checking a large folder costs, at the first start and at the next; and what looking for NaN costs in a batch.

    python benchmarks/bad_data.py        # -> benchmarks/bad_data.csv, about three minutes on one core

20,000 images of 32 x 32 pixels (JPEG) in 20 class folders, 1 % of them bad: truncated, empty, text, a vector drawing
under the name of a picture, more pixels than the limit, and too long and narrow, in turns. Each start is a process of
its own, with one thread and as many as there are cores; memory is what its peak rose while it loaded. On a machine with
other work the seconds of the processor are the ones to compare.
A second set of 400 images of 500 x 375 pixels tells what one image of the size of ImageNet's costs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from planish.data import EncodedImages, load_data
from planish.models import Preprocessing
from planish.network.faults import fault_in

LOOKS = Preprocessing((3, 224, 224))
FIELDS = (
    "what",
    "images",
    "bad",
    "threads",
    "seconds",
    "cpu_seconds",
    "cpu_ms_per_image",
    "megabytes_more",
    "table_megabytes",
)


def encoded(rng: np.random.Generator, size: tuple[int, int], form: str = "JPEG") -> bytes:
    """Smooth noise with some grain, about as large as a photograph of that size."""
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(int)
    image = Image.fromarray((pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, form, quality=92)
    return buffer.getvalue()


def bad_ones(good: bytes) -> list[bytes]:
    """One of each kind."""
    pictures = []
    for size in ((30_000, 3_000), (30_000, 1)):
        buffer = io.BytesIO()
        Image.new("1", size).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return [good[: len(good) // 2], b"", b"no image", b'<svg xmlns="http://www.w3.org/2000/svg"/>', *pictures]


def make(folder: Path, images: int, size: tuple[int, int], share_bad: float) -> Path:
    """Class folders with images, every so many of them bad."""
    rng = np.random.default_rng(0)
    kinds, every = bad_ones(encoded(rng, size)), round(1 / share_bad) if share_bad else 0
    for i in range(images):
        place = folder / f"class{i % 20:02}"
        place.mkdir(parents=True, exist_ok=True)
        bad = every and i % every == every - 1
        (place / f"{i:06}.jpg").write_bytes(kinds[i // every % len(kinds)] if bad else encoded(rng, size))
    return folder


def start(folder: str) -> None:
    """Load the folder (in a process of its own) and print what it took."""
    EncodedImages([], [], LOOKS)  # imports timm, which every command does
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, spent = time.perf_counter(), time.process_time()
    data = load_data(folder, LOOKS)
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(json.dumps({"seconds": seconds, "cpu": spent, "megabytes_more": more, "bad": len(data.skipped)}))


def measured(what: str, folder: Path, images: int, threads: int, cache: Path | None) -> dict[str, object]:
    """One start as a row."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, check=True,
        env={**os.environ, "PLANISH_CACHE": "" if cache is None else str(cache), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    table = sum(path.stat().st_size for path in cache.glob("*.sqlite")) / 1e6 if cache is not None else ""
    row = {
        "what": what, "images": images, "bad": found["bad"], "threads": threads, "seconds": f"{found['seconds']:.2f}",
        "cpu_seconds": f"{found['cpu']:.2f}", "cpu_ms_per_image": f"{1e3 * found['cpu'] / images:.3f}",
        "megabytes_more": f"{found['megabytes_more']:.0f}",
        "table_megabytes": table and f"{table:.2f}",
    }  # fmt: skip
    print(row, flush=True)
    return row


def batch_cost() -> dict[str, object]:
    """The look for NaN in a batch of 128 images at 224 pixels, median of 21, one thread."""
    torch.set_num_threads(1)
    images = torch.randn(128, 3, 224, 224)
    taken = []
    for _ in range(21):
        began = time.process_time()
        fault_in(images)
        taken.append(time.process_time() - began)
    return {"what": "look for NaN in a batch", "images": 128, "threads": 1, "cpu_seconds": f"{np.median(taken):.4f}",
            "cpu_ms_per_image": f"{1e3 * np.median(taken) / 128:.3f}"}  # fmt: skip


def main() -> None:
    """Measure, and write the table."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        small = make(Path(place) / "small", 20_000, (32, 32), 0.01)
        for threads in sorted({1, min(8, len(os.sched_getaffinity(0)))}):
            cache = Path(place) / f"cache{threads}"
            for name in ("first start", "next start"):
                rows.append(measured(f"20,000 at 32 x 32, {name}", small, 20_000, threads, cache))
        large = make(Path(place) / "large", 400, (500, 375), 0.0)
        rows.append(measured("400 at 500 x 375, first start", large, 400, 1, None))
    rows.append(batch_cost())
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start(sys.argv[1])
    else:
        main()
