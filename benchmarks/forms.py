"""The forms of flattening against each other on held-out training images: how the defaults were chosen.

    python scripts/train_embedded.py convnet --epochs 12 --holdout 10000 --out HELDOUT
    python benchmarks/forms.py --network convnet --weights HELDOUT/convnet.safetensors     # -> benchmarks/forms.csv

The network has never seen the last 10,000 training images of Fashion-MNIST; every form trains it further on 10,000 of
the first 50,000 and is measured on those last 10,000. The official test images are not touched. Needs the files of
Debian's ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from train_embedded import MEAN, STD, build, read_idx

from planish.data import BatchedTensorDataset, calibration_subset, make_loader
from planish.evaluation import evaluate
from planish.flattening import FlattenSettings, flatten, plain
from planish.models import Preprocessing, read_weights
from planish.ptq import quantize
from planish.training import TrainingSettings

SCHEMES = ("w4a4", "w3a3", "w2a4")


def forms(training: TrainingSettings) -> dict[str, FlattenSettings | None]:
    """Every form by name; ``default`` is what `planish.flatten` does if nothing is said."""
    default = FlattenSettings(training=training)
    averaged = plain(training, averaging=FlattenSettings.averaging)
    noisy = replace(averaged, share=1.0)
    gaussian = replace(noisy, weight_noise="differential", activation_noise="gaussian", clip_activations=True)
    half = replace(training, lr=0.01)
    free = replace(training, freeze_batchnorm=False)
    return {
        "given": None,
        "tuned": plain(training),
        "averaged": averaged,
        "swa, last half": plain(training, equal_averaging=True, averaging_start=0.5),
        "sam": plain(training, sam=0.05),
        "asam": plain(training, sam=0.5, adaptive_sam=True),
        **{f"averaged + kurtosis, {w:g}": replace(averaged, kurtosis=w) for w in (0.1, 1.0, 10.0, 100.0)},
        **{f"averaged + gradient-L1, {w:g}": replace(averaged, gradient_l1=w) for w in (1e-4, 1e-3, 1e-2, 5e-2)},
        "activations rounded, every step": replace(
            noisy, activation_noise="residual", clip_activations=True, activation_part=1.0, until=1.0
        ),
        "averaged, BatchNorm not frozen": replace(averaged, training=free),
        "averaged, half the learning rate": replace(averaged, training=half),
        "naive: differential + gaussian everywhere, no clip": replace(
            gaussian, clip_activations=False, nonzero_only=False
        ),
        "clip only": replace(noisy, clip_activations=True),
        "differential + gaussian, clip, non-zero": gaussian,
        "differential-forward + gaussian, clip, non-zero": replace(gaussian, weight_noise="differential-forward"),
        "uniform + uniform, clip, non-zero": replace(gaussian, weight_noise="uniform", activation_noise="uniform"),
        "residual + gaussian, clip, non-zero": replace(gaussian, weight_noise="residual", part=default.part),
        "residual + none": replace(noisy, weight_noise="residual", part=default.part),
        "none + residual": replace(noisy, activation_noise="residual"),
        "default (residual + residual, 60 % of the steps)": default,
        "default, 70 % of the steps": replace(default, share=0.7),
        "default, 50 % of the steps": replace(default, share=0.5),
        "default, every step": replace(default, share=1.0),
        "default, all weights and layers": replace(default, part=1.0, activation_part=1.0),
        "default, half the learning rate": replace(default, training=half),
        "default, BatchNorm not frozen": replace(default, training=free),
        "default + distillation": replace(default, distillation=1.0),
        "default + output error": replace(default, output_error=0.1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="convnet")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--forms", nargs="*", help="only those whose name contains one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = build(args.network)
    given.load_state_dict(read_weights(args.weights)[0])
    images = read_idx(args.data / "train-images-idx3-ubyte.gz")[:, None]
    labels = read_idx(args.data / "train-labels-idx1-ubyte.gz").long()
    chosen = torch.randperm(50_000, generator=torch.Generator().manual_seed(123))[:10_000]
    look = Preprocessing(input_size=(1, 28, 28), mean=(MEAN,), std=(STD,), crop_pct=1.0)
    heldout = make_loader(BatchedTensorDataset(images[-10_000:], labels[-10_000:], look), 500, shuffle=False, seed=0)
    known = set()
    if args.out.exists():
        with args.out.open() as file:
            known = {(r["network"], r["form"], r["seed"]) for r in csv.DictReader(file)}
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not known:
            writer.writerow(
                ["network", "form", "seed", "fp_top1", *SCHEMES, "epochs", "train_seconds", "heldout_images", "torch"]
            )
        for seed in args.seeds:
            train = BatchedTensorDataset(images[chosen], labels[chosen], look, augment=True, seed=seed)
            loader = make_loader(train, 128, shuffle=True, seed=seed, drop_last=True)
            subset = calibration_subset(train, labels[chosen].tolist(), 512, seed)
            calibration = make_loader(subset, 128, shuffle=False, seed=0)
            for name, settings in forms(TrainingSettings(epochs=args.epochs, seed=seed)).items():
                if (args.network, name, str(seed)) in known or (args.forms and not any(f in name for f in args.forms)):
                    continue
                began = time.perf_counter()
                model = given if settings is None else flatten(given, loader, SCHEMES, settings=settings)
                seconds = round(time.perf_counter() - began, 1)
                worth = [evaluate(model, heldout)["top1"]]
                worth += [evaluate(quantize(model, calibration, s), heldout)["top1"] for s in SCHEMES]
                row = [args.network, name, seed, *(round(w, 4) for w in worth)]
                writer.writerow([*row, args.epochs if settings else 0, seconds, 10_000, torch.__version__])
                file.flush()
                print(row, f"{seconds} s", flush=True)


if __name__ == "__main__":
    main()
