"""When does flattening pay: every arm at equal epochs, several seeds, under several quantizers.

    python benchmarks/evidence/study.py --networks-folder NETWORKS     # -> benchmarks/evidence/study.csv, continued
    python benchmarks/evidence/study.py --summary

An arm is a way to train a finished network on for a few epochs over the same images. Each trained network is kept as
NETWORKS/MODEL-ARM-SEED.safetensors, so that other scripts (benchmarks/flatness.py) can look at the same networks. The
images of the embedded networks are the embedded ones: 10,000 to train on, 2,000 official test images to measure on.
Settings were chosen on networks trained without the last 10,000 training images, and on those images, never on the test
images (benchmarks/forms.py). The networks of small_images.py (``--networks cifar10-resnet20 --small FOLDER``) are
trained on 10,000 of their 50,000 images and measured on all test images, with the settings of the embedded ones.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from csv_rows import continue_rows, scheme_table
from small_images import add_arguments, load_network, parse

from planish.data import calibration_subset, make_loader
from planish.evaluation import evaluate, predict
from planish.flattening import FlattenSettings, flatten, plain
from planish.models import fit_weights, read_weights, save_weights
from planish.ptq import METHODS, quantize
from planish.training import TrainingSettings

PREPARED = ("w4a4", "w3a3", "w2a4")  # the schemes whose errors a flat arm is trained under, one step one scheme
SCHEMES = ("w8a8", "w6a6", "w4a4", "w3a3", "w2a4", "w2a2")
Cells = dict[tuple[str, str, str, str], list[float]]  # network, method, arm, scheme
KURE, GRADIENT_L1 = 100.0, 1e-4  # best at w3a3 on held-out images, float within half a point (benchmarks/forms.py)
FIELDS = ["model", "checkpoint", "arm", "seed", "scheme", "method", "fp_top1", "top1", "nll", "ece", "flip_rate",
          "epochs", "train_images", "test_images", "calibration_images", "batch_size", "threads", "quantize_seconds",
          "train_seconds", "torch"]  # fmt: skip


def arms(training: TrainingSettings) -> dict[str, FlattenSettings | None]:
    """Every arm by name; ``flat`` is what `planish.flatten` does if nothing is said."""
    flat = FlattenSettings(training=training)
    averaged = plain(training, averaging=FlattenSettings.averaging)
    clipped = replace(averaged, clip_activations=True, share=flat.share)
    gaussian = replace(clipped, weight_noise="differential", activation_noise="gaussian")
    rounded = replace(flat, weight_noise="none", activation_part=1.0, share=1.0, until=1.0)
    unlabelled: dict[str, Any] = {"task": 0.0, "distillation": 1.0}
    free = replace(flat, training=replace(training, freeze_batchnorm=False))
    return {
        "given": None,
        "tuned": plain(training),
        "averaged": averaged,
        "swa": plain(training, equal_averaging=True, averaging_start=0.5),
        "sam": plain(training, sam=0.05),
        "asam": plain(training, sam=0.5, adaptive_sam=True),
        "kure": replace(averaged, kurtosis=KURE),
        "gradient-l1": replace(averaged, gradient_l1=GRADIENT_L1),
        "clip only": clipped,
        "gaussian": gaussian,
        "gaussian, naive": replace(gaussian, clip_activations=False, nonzero_only=False, share=1.0),
        "gaussian, forward": replace(gaussian, weight_noise="differential-forward"),
        "uniform": replace(gaussian, weight_noise="uniform", activation_noise="uniform"),
        "residual, weights": replace(clipped, weight_noise="residual", part=flat.part, clip_activations=False),
        "residual, activations": replace(flat, weight_noise="none"),
        "activations rounded": rounded,
        "averaged, without labels": replace(averaged, **unlabelled),
        "activations rounded, without labels": replace(rounded, **unlabelled),
        "flat": flat,
        "flat, not averaged": replace(flat, averaging=None),
        "flat, distilled": replace(flat, distillation=1.0),
        "flat, without labels": replace(flat, **unlabelled),
        "flat, batch statistics": free,
        "flat, without labels, batch statistics": replace(free, **unlabelled),
    }


class Study:
    """A network and its images, for one seed."""

    def __init__(self, name: str, seed: int, args: argparse.Namespace) -> None:
        self.name, self.seed, self.args = name, seed, args
        self.loaded, self.data = load_network(name, seed, args)
        self.test = make_loader(self.data.test, 500, shuffle=False, seed=0)
        subset = calibration_subset(self.data.train, self.data.train_labels, args.calibration, seed)
        self.calibration = make_loader(subset, args.batch_size, shuffle=False, seed=0)
        self.reference, _, _ = predict(self.loaded.model, self.test)

    def network(self, arm: str, settings: FlattenSettings | None) -> tuple[nn.Module, float | None]:
        """The network of an arm, from its file or trained, and the seconds that the training took."""
        path = (
            self.args.networks_folder / f"{self.name}-{arm.replace(' ', '_').replace(',', '')}-{self.seed}.safetensors"
        )
        if path.exists():
            model = copy.deepcopy(self.loaded.model)
            state, metadata = read_weights(path)
            fit_weights(model, state, name=arm, source=path)
            return model.eval(), float(metadata.get("train_seconds", "nan"))
        began = time.perf_counter()
        loader = make_loader(
            self.data.train, self.args.batch_size, shuffle=True, seed=self.seed, augment=True, drop_last=True
        )
        given = self.loaded.model
        model = given if settings is None else flatten(given, loader, PREPARED, settings=settings)
        seconds = round(time.perf_counter() - began, 1)
        save_weights(model, path, {"train_seconds": str(seconds)})
        return model, seconds

    def rows(
        self, arm: str, settings: FlattenSettings | None, wanted: list[tuple[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """A row for each (scheme, method) that is wanted."""
        model, seconds = self.network(arm, settings)
        common = {
            "model": self.name, "checkpoint": self.loaded.weights_hash, "arm": arm, "seed": self.seed,
            "fp_top1": round(evaluate(model, self.test)["top1"], 5), "epochs": self.args.epochs if settings else 0,
            "train_images": len(self.data.train_labels), "test_images": len(self.data.test),
            "calibration_images": self.args.calibration, "batch_size": self.args.batch_size,
            "threads": self.args.threads, "train_seconds": seconds, "torch": torch.__version__,
        }  # fmt: skip
        for scheme, method in wanted:
            began = time.perf_counter()
            quantized = quantize(model, self.calibration, scheme, METHODS[method].passes())
            spent = round(time.perf_counter() - began, 1)
            worth = evaluate(quantized, self.test, reference=self.reference)
            figures = {k: round(worth[k], 5) for k in ("top1", "nll", "ece", "flip_rate")}
            yield common | {"scheme": scheme, "method": method, "quantize_seconds": spent} | figures


def measure(args: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The rows that are not there yet, the first seed of everything first."""
    for seed in args.seeds:
        for name in args.networks:
            study = None
            for arm, settings in arms(TrainingSettings(epochs=args.epochs, seed=seed)).items():
                wanted = [
                    (s, m) for m in args.methods for s in args.schemes if (name, arm, str(seed), s, m) not in done
                ]
                if wanted and (not args.arms or arm in args.arms):
                    study = study or Study(name, seed, args)
                    yield from study.rows(arm, settings, wanted)


def read_top1(path: Path) -> Cells:
    """Top-1 in percent of every seed by network, method, arm and scheme; that in float under the scheme "float"."""
    cells: dict[tuple[str, str, str, str], dict[str, float]] = defaultdict(dict)
    with path.open() as file:
        for row in csv.DictReader(file):
            for scheme, key in ((row["scheme"], "top1"), ("float", "fp_top1")):
                cells[row["model"], row["method"], row["arm"], scheme][row["seed"]] = 100 * float(row[key])
    return {key: list(values.values()) for key, values in cells.items()}


def summary(path: Path) -> str:
    """Top-1 in percent, mean and standard error over the seeds, a table for each network and method."""
    cells = read_top1(path)
    lines = []
    for model, method in dict.fromkeys(key[:2] for key in cells):
        mine = [key for key in cells if key[:2] == (model, method)]
        schemes = [s for s in ("float", *SCHEMES) if any(key[3] == s for key in mine)]
        lines += scheme_table(
            f"{model}, {method}", schemes, dict.fromkeys(key[2] for key in mine),
            lambda arm, s, model=model, method=method: cells.get((model, method, arm, s), []),
        )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--networks-folder", type=Path, default=Path("networks"))
    add_arguments(parser)
    parser.add_argument("--arms", nargs="*")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", default=["rtn"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true")
    args = parse(parser)
    if args.summary:
        print(summary(args.out))
        return
    torch.set_num_threads(args.threads)
    args.networks_folder.mkdir(parents=True, exist_ok=True)
    continue_rows(
        args.out, FIELDS, lambda r: (r["model"], r["arm"], r["seed"], r["scheme"], r["method"]),
        lambda done: measure(args, done), ("model", "arm", "seed", "scheme", "method", "fp_top1", "top1"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
