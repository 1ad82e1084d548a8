"""What an iteration of a reconstruction costs with products in float32 and in bfloat16.

    python benchmarks/reconstruction_precision.py    # -> benchmarks/reconstruction_precision.csv

Two blocks as in ViT-Tiny/16 at 224 pixels (random weights), and the stages of a ResNet-20 at 32 pixels; 64 images,
batches of 32, w4a4. An iteration in all units costs (the processor time of many) minus (the time of few), divided by
the difference; both precisions take turns in one process. What bfloat16 does to the result is in ``ptq.csv``
("best-vit, bfloat16").
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import timm
import torch
from csv_rows import write_rows
from export import processor
from small_images import ResNet20
from torch import Tensor, nn

from planish.ptq import Calibrate, FoldBatchNorm, Reconstruct, Round, quantize
from planish.ptq.precision import PRECISIONS


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks with random weights, and their images."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    return {
        "vit-tiny, 2 blocks": (vit.eval(), torch.randn(64, 3, 224, 224, generator=generator)),
        "resnet-20": (ResNet20(10).eval(), torch.randn(64, 3, 32, 32, generator=generator)),
    }


def seconds(model: nn.Module, images: Tensor, precision: str, iterations: int) -> float:
    """Processor time of a quantization."""
    step = Reconstruct(iterations=iterations, precision=precision)
    began = time.process_time()
    quantize(model, [images], "w4a4", [FoldBatchNorm(), Calibrate(), Round(), step])
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs=2, default=[2, 14])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    few, many = args.iterations
    rows = []
    for name, (model, images) in networks().items():
        seconds(model, images, "float32", few)  # what is slow the first time
        taken: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(args.repeats):
            for precision in PRECISIONS:
                less, more = (seconds(model, images, precision, count) for count in (few, many))
                taken[precision].append(1e3 * (more - less) / (many - few))
        middle = {precision: statistics.median(values) for precision, values in taken.items()}
        for precision, values in taken.items():
            rows.append({
                "network": name, "precision": precision, "ms_per_iteration": f"{middle[precision]:.1f}",
                "lowest": f"{min(values):.1f}", "highest": f"{max(values):.1f}",
                "of_float32": f"{middle[precision] / middle['float32']:.3f}", "repeats": args.repeats, "batch": 32,
                "threads": 1, "processor": processor(), "torch": torch.__version__,
            })  # fmt: skip
            print(rows[-1], flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
