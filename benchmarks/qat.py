"""Every training method on the quantized network itself: equal epochs, three seeds, both embedded networks.

    python benchmarks/qat.py --suite methods      # -> benchmarks/qat.csv, continued if it is there
    python benchmarks/qat.py --summary            # the tables: mean, standard error, differences paired by seed

A suite is a list of arms. An arm is a method with its options, where it starts, and how many of the labels it sees. The
images of the embedded networks are the embedded ones: 10,000 to train on, 2,000 official test images to measure on.
Settings were chosen on networks trained without the last 10,000 training images, and on those images, never on the test
images. The networks of small_images.py (``--networks cifar10-resnet20 --small NETWORKS``) train on 10,000 of their
50,000 images and are measured on all test images, with the settings that were chosen on the embedded ones, but for the
learning rate of the ViTs (``--held-out``; other rates are in qat_rate.csv, ``--lr``). The suites "all images" and
"longer" train on all 50,000 (Fashion-MNIST: 60,000) instead, "longer" for twice the epochs.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from csv_rows import continue_rows, scheme_table
from small_images import add_arguments, load_network, parse
from torch import nn
from torch.utils.data import Subset

from planish.data import calibration_subset, make_loader
from planish.evaluation import evaluate, predict
from planish.flattening import FlattenSettings, flatten, plain
from planish.ptq import quantize
from planish.qat import METHODS, Method, QATSettings, get_method, train_quantized
from planish.qat.cr import CR
from planish.qat.fpq import FPQ
from planish.qat.mec import MEC
from planish.qat.ofq import OFQ
from planish.training import TrainingSettings

# Peak, chosen on held-out images: among 5e-4, 1e-3, 2e-3 and 4e-3 here, among 5e-4 and 2e-3 on the ViT on CIFAR-10,
# which has the default, 5e-4, like the one on Tiny-ImageNet-100. Convolutional networks have theirs, 0.02.
LR = {"vit": 2e-3}
ALL_IMAGES, LONGER = "all images", "longer"  # suites that train on all images that the network was trained on


@dataclass(frozen=True)
class Arm:
    """One way to a quantized network. ``method`` None: rounding (``rtn``) after training in float."""

    name: str
    method: Method | None = None
    start: str = "given"  # or "tuned", "flat": half of the epochs go into flattening, or a method of `planish quantize`
    labels: int = 0  # labelled images; 0: all. The rest is given as unlabelled images where the method takes them
    averaging: float | None = QATSettings.averaging
    schemes: tuple[str, ...] = ("w4a4", "w2a4", "w2a2")
    times: int = 1  # the epochs, so many times


def suites() -> dict[str, list[Arm]]:
    """The arms of every suite."""
    methods = [Arm("rtn"), Arm("tuned, rtn", start="tuned"), Arm("flat, rtn", start="flat only")]
    methods += [Arm("lsq, last weights", Method(), averaging=None)]
    methods += [Arm(name, get_method(name)) for name in METHODS]
    low: dict[str, Any] = {"schemes": ("w2a2",)}
    starts = [
        Arm("given, lsq", Method(), **low),
        Arm("flat, lsq", Method(), start="flat", **low),
        Arm("given, kd", get_method("kd"), **low),
        Arm("flat, kd", get_method("kd"), start="flat", **low),
    ]
    ablations = [
        Arm("lsq", Method(), **low),
        Arm("fpq: perturbation only", FPQ(csd=0.0), **low),
        Arm("fpq: distillation only", FPQ(p=0.0), **low),
        Arm("fpq", FPQ(), **low),
        Arm("ofq: StatsQ", OFQ(query_key=False, annealing=0.0, activations="lsq"), **low),
        Arm("ofq: StatsQ, shifts", OFQ(query_key=False, annealing=0.0), **low),
        Arm("ofq: StatsQ, shifts, query-key", OFQ(annealing=0.0), **low),
        Arm("ofq", OFQ(), **low),
        *(Arm(f"mec, {n} experts", MEC(experts=n), **low) for n in (1, 4, 8)),
        Arm("lsq, 10 % of the labels", Method(), labels=1000, **low),
        Arm("cr, 10 % of the labels", CR(), labels=1000, **low),
        Arm("cr", CR(), **low),
    ]
    every = [
        Arm("rtn"),
        Arm("tuned, rtn", start="tuned"),
        *(Arm(m, get_method(m)) for m in ("lsq", "kd", "fpq", "mec")),
    ]
    longer = [Arm("fpq", get_method("fpq"), schemes=("w4a4",), times=2)]
    return {"methods": methods, "starts": starts, "ablations": ablations, ALL_IMAGES: every, LONGER: longer}


FIELDS = ["network", "checkpoint", "fp_top1", "suite", "arm", "method", "options", "start", "scheme", "seed", "top1",
          "nll", "ece", "flip_rate", "epochs", "lr", "averaging", "labels", "train_images", "test_images", "batch_size",
          "threads",
          "train_seconds", "torch"]  # fmt: skip


@dataclass
class Study:
    """A network and its images, for one seed."""

    name: str
    args: argparse.Namespace
    seed: int
    everything: bool = False  # all training images

    def __post_init__(self) -> None:
        self.loaded, self.data = load_network(self.name, self.seed, self.args, everything=self.everything)
        self.test = make_loader(self.data.test, 500, shuffle=False, seed=0)
        self.reference, _, _ = predict(self.loaded.model, self.test)
        self.fp_top1 = evaluate(self.loaded.model, self.test)["top1"]

    @property
    def lr(self) -> float | None:
        return self.args.lr or LR.get(self.name)

    def loader(self, dataset: Any) -> Any:
        return make_loader(dataset, self.args.batch_size, shuffle=True, seed=self.seed, augment=True, drop_last=True)

    def train(self, arm: Arm, scheme: str) -> nn.Module:
        epochs = arm.times * self.args.epochs
        training = TrainingSettings(epochs=epochs, lr=self.lr, seed=self.seed)
        given, loader = self.loaded.model, self.loader(self.data.train)
        unlabelled = None
        if arm.labels:
            few = calibration_subset(self.data.train, self.data.train_labels, arm.labels, self.seed)
            # as many steps as with all the labels: the few labelled images come round more often
            repeats = len(self.data.train_labels) // arm.labels
            loader = self.loader(Subset(self.data.train, [*few.indices] * repeats))
            rest = sorted(set(range(len(self.data.train_labels))) - set(few.indices))
            unlabelled = self.loader(Subset(self.data.train, rest))
        subset = calibration_subset(self.data.train, self.data.train_labels, 512, self.seed)
        calibration = make_loader(subset, self.args.batch_size, shuffle=False, seed=0)
        if arm.method is None:
            settings = {
                "tuned": plain(training, averaging=arm.averaging),
                "flat only": FlattenSettings(training=training),
            }
            model = given if arm.start == "given" else flatten(given, loader, scheme, settings=settings[arm.start])
            return quantize(model, calibration, scheme)
        start = given
        if arm.start == "flat":
            half = FlattenSettings(training=replace(training, epochs=epochs // 2))
            start = flatten(given, loader, scheme, settings=half)
            training = replace(training, epochs=epochs - epochs // 2)
        elif arm.start != "given":
            start = quantize(given, calibration, scheme, arm.start)
        if not arm.method.takes_unlabelled:
            unlabelled = None
        settings = QATSettings(averaging=arm.averaging, training=replace(training, freeze_batchnorm=False))
        return train_quantized(
            start, loader, scheme, arm.method, given=given, calibration=calibration, unlabelled=unlabelled,
            settings=settings,
        )  # fmt: skip

    def row(self, suite: str, arm: Arm, scheme: str) -> dict[str, Any]:
        began = time.perf_counter()
        model = self.train(arm, scheme)
        seconds = round(time.perf_counter() - began, 1)
        worth = evaluate(model, self.test, reference=self.reference)
        method = arm.method
        options = {} if method is None else {
            f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default
        }  # fmt: skip
        return {
            "network": self.name, "checkpoint": self.loaded.weights_hash, "fp_top1": round(self.fp_top1, 5),
            "suite": suite,
            "arm": arm.name, "method": method.name if method else "rtn",
            "options": " ".join(f"{k}={v}" for k, v in options.items()), "start": arm.start, "scheme": scheme,
            "seed": self.seed, **{k: round(worth[k], 5) for k in ("top1", "nll", "ece", "flip_rate")},
            "epochs": arm.times * self.args.epochs, "lr": self.lr or "default", "averaging": arm.averaging,
            "labels": arm.labels or len(self.data.train_labels),
            "train_images": len(self.data.train_labels), "test_images": len(self.data.test),
            "batch_size": self.args.batch_size, "threads": self.args.threads, "train_seconds": seconds,
            "torch": torch.__version__,
        }  # fmt: skip


def measure(args: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The rows that are not there yet, the first seed of everything first."""
    for seed in args.seeds:
        for name in args.networks:
            studies: dict[bool, Study] = {}  # by whether they have all training images
            for suite in args.suite:
                everything = suite in (ALL_IMAGES, LONGER)
                for arm in suites()[suite]:
                    if args.arms and arm.name not in args.arms:
                        continue
                    for scheme in arm.schemes:
                        key = (name, suite, arm.name, scheme, str(seed))
                        if scheme in args.schemes and key not in done:
                            if everything not in studies:
                                studies[everything] = Study(name, args, seed, everything)
                            yield studies[everything].row(suite, arm, scheme)


def summary(path: Path) -> str:
    """Top-1 in percent, mean and standard error over the seeds, a table for each suite and network."""
    cells: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    float_top1: dict[str, str] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            cells[row["suite"], row["network"], row["arm"], row["scheme"]].append(100 * float(row["top1"]))
            float_top1[row["network"]] = f"{100 * float(row['fp_top1']):.2f}"

    lines = []
    for suite, network in dict.fromkeys(key[:2] for key in cells):
        mine = [key for key in cells if key[:2] == (suite, network)]
        schemes = [s for s in ("w4a4", "w2a4", "w2a2") if any(key[3] == s for key in mine)]
        lines += scheme_table(
            f"{network}, {suite} (float {float_top1[network]})", schemes, dict.fromkeys(key[2] for key in mine),
            lambda arm, s, suite=suite, network=network: cells.get((suite, network, arm, s), []),
        )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--suite", nargs="+", default=["methods"], choices=list(suites()))
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--schemes", nargs="+", default=["w2a2", "w4a4", "w2a4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="peak learning rate; rows do not go by it: give another --out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="only print the tables of what is measured")
    args = parse(parser)
    torch.set_num_threads(args.threads)
    if not args.summary:
        continue_rows(
            args.out, FIELDS, lambda r: (r["network"], r["suite"], r["arm"], r["scheme"], r["seed"]),
            lambda done: measure(args, done), ("network", "arm", "scheme", "seed", "top1", "train_seconds"),
        )  # fmt: skip
    print(summary(args.out))


if __name__ == "__main__":
    main()
