"""Every arm under calibrated rounding, at equal epochs, three seeds, both embedded networks.

    python benchmarks/arms.py                  # -> benchmarks/arms.csv, continued if it is there
    python benchmarks/arms.py --summary        # the table: mean, standard error, differences paired by seed

The arms and their settings are those of `planish run`; the images are the embedded ones (10,000 to train on, 2,000
official test images to measure on). Settings were chosen on networks trained without the last 10,000 training images,
and on those images, never on the test images.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from planish.data import calibration_subset, load_data, make_loader
from planish.evaluation import evaluate, predict
from planish.flattening import flatten
from planish.models import load_model
from planish.ptq import quantize
from planish.recipes.arms import ARMS, arm_settings
from planish.recipes.config import NoiseOptions, RunConfig, TrainOptions
from planish.report.charts import chart_png

FIELDS = [
    "model",
    "checkpoint",
    "arm",
    "prepared_for",
    "seed",
    "scheme",
    "method",
    "fp_top1",
    "top1",
    "nll",
    "ece",
    "flip_rate",
    "epochs",
    "lr",
    "train_images",
    "test_images",
    "calibration_images",
    "batch_size",
    "threads",
    "train_seconds",
    "torch",
    "settings",
]


def measure(args: argparse.Namespace, name: str, seed: int, done: set[tuple[str, ...]]) -> Iterator[dict[str, object]]:
    """The rows of one network and seed whose arm is not complete yet, as they are measured."""
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing, seed=seed)
    train = make_loader(data.train, args.batch_size, shuffle=True, seed=seed, augment=True, drop_last=True)
    subset = calibration_subset(data.train, data.train_labels, args.calibration, seed)
    calibration = make_loader(subset, args.batch_size, shuffle=False, seed=0)
    test = make_loader(data.test, 500, shuffle=False, seed=0)
    reference, _, _ = predict(loaded.model, test)
    for arm in args.arms:
        if all((name, arm, str(seed), scheme) in done for scheme in args.schemes):
            continue
        settings = arm_settings(arm, TrainOptions(epochs=args.epochs, lr=args.lr), NoiseOptions(), seed)
        began = time.perf_counter()
        model = loaded.model if settings is None else flatten(loaded.model, train, args.prepare, settings=settings)
        seconds = time.perf_counter() - began
        common = {
            "model": name,
            "checkpoint": loaded.weights_hash,
            "arm": arm,
            "prepared_for": " ".join(args.prepare) if arm == "flat" else "",
            "seed": seed,
            "method": "rtn",
            "fp_top1": evaluate(model, test)["top1"],
            "epochs": args.epochs if settings else 0,
            "lr": args.lr or "default",
            "train_images": len(data.train_labels),
            "test_images": len(data.test),
            "calibration_images": args.calibration,
            "batch_size": args.batch_size,
            "threads": args.threads,
            "train_seconds": round(seconds, 1),
            "torch": torch.__version__,
            "settings": hashlib.sha256(repr(settings).encode()).hexdigest()[:12],
        }
        for scheme in args.schemes:
            worth = evaluate(quantize(model, calibration, scheme, "rtn"), test, reference=reference)
            yield common | {"scheme": scheme, **{k: round(worth[k], 5) for k in ("top1", "nll", "ece", "flip_rate")}}


def summary(path: Path) -> str:
    """Mean and standard error over the seeds, and flat minus averaged paired by seed; top-1 in percent."""
    cells: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            cells[row["model"], row["arm"], row["scheme"]][int(row["seed"])] = 100 * float(row["top1"])
            cells[row["model"], row["arm"], "fp"][int(row["seed"])] = 100 * float(row["fp_top1"])

    def text(values: list[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):6.2f} ± {error:.2f}"

    models = list(dict.fromkeys(key[0] for key in cells))
    schemes = list(dict.fromkeys(key[2] for key in cells))
    schemes.sort(key=lambda s: -1 if s == "fp" else 0)
    lines = []
    for model in models:
        lines.append(f"| {model} | " + " | ".join(schemes) + " |")
        lines.append("|---" * (len(schemes) + 1) + "|")
        for arm in [a for a in ARMS if (model, a, "fp") in cells]:
            lines.append(f"| {arm} | " + " | ".join(text(list(cells[model, arm, s].values())) for s in schemes) + " |")
        pairs = [(cells[model, "flat", s], cells[model, "averaged", s]) for s in schemes]
        gaps = [[flat[seed] - other[seed] for seed in flat if seed in other] for flat, other in pairs]
        if all(gaps):
            lines.append("| flat - averaged | " + " | ".join(text(gap) for gap in gaps) + " |")
        lines.append("")
    return "\n".join(lines)


def pictures(path: Path, folder: Path) -> None:
    """One chart a network, top-1 against bits with the seeds as error bars."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row | {"top1": float(row["top1"])} for row in rows if row["model"] == model]
        seen = {(row["arm"], row["seed"]): float(row["fp_top1"]) for row in mine}
        full = [
            {"arm": a, "seed": s, "scheme": "fp32", "method": "none", "top1": top1} for (a, s), top1 in seen.items()
        ]
        chart_png({"rows": full + mine}, folder / f"{model}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a4", "w3a3", "w2a4"])
    parser.add_argument("--prepare", nargs="+", default=list(RunConfig.schemes))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=None, help="peak learning rate; default: that of `planish run`")
    parser.add_argument("--epochs", type=int, default=TrainOptions.epochs)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="only print the table of what is measured")
    parser.add_argument("--pictures", type=Path, help="folder for a chart of each network")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done: set[tuple[str, ...]] = set()
    if args.out.exists():
        with args.out.open() as file:
            done = {(r["model"], r["arm"], r["seed"], r["scheme"]) for r in csv.DictReader(file)}
    if not args.summary:
        fresh = not done
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if fresh:
                writer.writeheader()
            for seed in args.seeds:
                for name in args.models:
                    for row in measure(args, name, seed, done):
                        writer.writerow(row)
                        file.flush()
                        print({k: row[k] for k in ("model", "arm", "seed", "scheme", "fp_top1", "top1")}, flush=True)
    print(summary(args.out))
    if args.pictures:
        pictures(args.out, args.pictures)


if __name__ == "__main__":
    main()
