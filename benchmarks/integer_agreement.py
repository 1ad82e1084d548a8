"""The integer reference against the fake-quantized network on the 2,000 embedded test images.

    python benchmarks/integer_agreement.py             # -> benchmarks/integer_agreement.csv, continued if it is there

A line for each network, scheme and method: images whose top-1 differs, each with its number and its margin (the first
logit less the second in the fake-quantized network), and how far apart logits are. ``images_apart`` counts those with a
logit that differs by more than 1e-3: somewhere a value lay so near a tie between two codes that it was rounded the
other way, and that step went on through the network. ``batch_differing`` and ``batch_apart`` are the same figures for
the fake-quantized network against itself with another batch size: how much of it is float arithmetic anyway.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch
from torch import Tensor

from planish.data import calibration_subset, load_data, make_loader
from planish.deploy.integers import integer_model, integer_report
from planish.models import load_model
from planish.ptq import quantize

SCHEMES = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
FIELDS = ["network", "checkpoint", "scheme", "method", "images", "differing", "differing_images_and_margins",
          "images_apart", "largest_difference", "median_difference", "batch_differing", "batch_apart",
          "products_in_integers", "products_in_float", "float_seconds", "integer_seconds", "threads",
          "torch"]  # fmt: skip


@torch.no_grad()
def logits(model: torch.nn.Module, images: Tensor, batch: int) -> tuple[Tensor, float]:
    began = time.perf_counter()
    out = torch.cat([model(part) for part in images.split(batch)])
    return out, time.perf_counter() - began


def compare(name: str, scheme: str, method: str, batch: int) -> dict[str, object]:
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing)
    subset = calibration_subset(data.train, data.train_labels, 512, 0)
    calibration = [part[0] for part in make_loader(subset, 128, shuffle=False, seed=0)]
    images = torch.cat([part[0] for part in make_loader(data.test, 500, shuffle=False, seed=0)])
    quantized = quantize(loaded.model, calibration, scheme, method)
    whole = integer_model(quantized)
    fake, fake_seconds = logits(quantized, images, batch)
    other, _ = logits(quantized, images, batch // 2 - 1)
    integer, integer_seconds = logits(whole, images, batch)
    report, top = integer_report(whole), fake.topk(2).values
    apart, again = ((x - fake).abs().amax(1) for x in (integer, other))
    differing = (integer.argmax(1) != fake.argmax(1)).nonzero().flatten().tolist()
    return {
        "network": name, "checkpoint": loaded.weights_hash, "scheme": scheme, "method": method, "images": len(images),
        "differing": len(differing),
        "differing_images_and_margins": " ".join(f"{i}:{float(top[i, 0] - top[i, 1]):.2g}" for i in differing),
        "images_apart": int((apart > 1e-3).sum()), "largest_difference": f"{float(apart.max()):.2g}",
        "median_difference": f"{float(apart.median()):.2g}",
        "batch_differing": int((other.argmax(1) != fake.argmax(1)).sum()), "batch_apart": int((again > 1e-3).sum()),
        "products_in_integers": len(report.rows) - len(report.in_float), "products_in_float": len(report.in_float),
        "float_seconds": round(fake_seconds, 1), "integer_seconds": round(integer_seconds, 1),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vit", "convnet"])
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=["rtn", "fast"])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done = set()
    if args.out.exists():
        with args.out.open() as file:
            done = {(r["network"], r["scheme"], r["method"]) for r in csv.DictReader(file)}
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for name in args.networks:
            for method in args.methods:
                for scheme in args.schemes:
                    if (name, scheme, method) not in done:
                        writer.writerow(row := compare(name, scheme, method, args.batch))
                        file.flush()
                        print({k: v for k, v in row.items() if k != "checkpoint"}, flush=True)


if __name__ == "__main__":
    main()
