"""What the imitation of rounding foretells, against what rounding does: how `planish diagnose` came to its error bars.

    python benchmarks/evidence/study.py --networks-folder NETWORKS       # the networks
    python benchmarks/prediction.py --networks-folder NETWORKS           # -> benchmarks/prediction.csv, continued
    python benchmarks/prediction.py --networks vit-tiny efficientnet-lite0 --shared ../shared/data
    python benchmarks/prediction.py --fit          # the constants of planish.flatness.prediction, and the error of each
                                                   # network type when they are fitted on the other

The imitation looks at 512 training images (of the networks with ImageNet weights: at half of the photographs), the
measured top-1 is that of calibrated rounding on the 2,000 official test images (on the other half).
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from planish.data import calibration_subset, load_data, make_loader
from planish.evaluation import predict, worth
from planish.flatness.imitation import Imitation, imitate
from planish.flatness.prediction import SMALLEST, Calibration, Prediction, from_imitation
from planish.flatness.subject import Subject
from planish.models import fit_weights, load_model, read_weights
from planish.task import CLASSES

SCHEMES = ("w8a8", "w6a6", "w5a5", "w4a8", "w4a4", "w3a8", "w3a3", "w2a8", "w2a4", "w2a2", "w8a4", "w8a3", "w8a2")
FIELDS = ["model", "arm", "seed", "scheme", "images", "clean_top1", "clean_loss", "imitated_divergence",
          "imitated_loss", "imitated_top1", "divergence", "loss", "fp_top1", "top1", "test_images", "draws",
          "torch"]  # fmt: skip


def networks(args: argparse.Namespace) -> Iterator[tuple[str, str, int, nn.Module, list[Any], Any]]:
    """(model, arm, seed, network, labelled images to look at, loader of test images)."""
    for name in args.networks:
        if name not in ("convnet", "vit"):
            from ptq import NETWORKS  # the benchmark beside this one

            for seed in args.seeds:
                work = NETWORKS[name](name, seed, args)
                yield name, "given", seed, work.model, work.labelled, work.test
            continue
        loaded = load_model(name)
        for path in sorted(args.networks_folder.glob(f"{name}-*.safetensors")):
            _, arm, seed = path.stem.split("-", 2)
            data = load_data(None, loaded.preprocessing, seed=int(seed))
            subset = calibration_subset(data.train, data.train_labels, 512, int(seed))
            model = copy.deepcopy(loaded.model)
            fit_weights(model, read_weights(path)[0], name=arm, source=path)
            images = list(make_loader(subset, 128, shuffle=False, seed=0))
            yield name, arm, int(seed), model.eval(), images, make_loader(data.test, 500, shuffle=False, seed=0)


def rows(
    name: str, arm: str, seed: int, model: nn.Module, images: list[Any], test: Any, args: argparse.Namespace
) -> Iterator[Any]:
    """A row for each scheme."""
    subject = Subject.prepare(model, images, args.schemes)
    labels = torch.cat([y for _, y in subject.batches])
    reference = subject.logits()
    clean = worth(reference, labels)
    fp, test_labels, _ = predict(subject.model, test)
    for scheme in args.schemes:
        guess = imitate(subject, scheme, draws=args.draws, seed=seed)
        with subject.tapped(subject.quantizers[scheme]):
            logits, (out, _, _) = subject.logits(), predict(subject.model, test)
        yield {
            "model": name, "arm": arm, "seed": seed, "scheme": scheme, "images": len(labels),
            "clean_top1": clean["top1"], "clean_loss": clean["nll"], "imitated_divergence": guess.divergence,
            "imitated_loss": guess.loss, "imitated_top1": guess.top1,
            "divergence": CLASSES.exact(reference, logits).mean().item(), "loss": worth(logits, labels)["nll"],
            "fp_top1": worth(fp, test_labels)["top1"], "top1": worth(out, test_labels)["top1"],
            "test_images": len(test_labels), "draws": args.draws, "torch": torch.__version__,
        }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        found = list(csv.DictReader(file))
    texts = ("model", "arm", "scheme", "torch")
    return [{k: v if k in texts else float(v) for k, v in row.items()} for row in found]


def fit(rows: list[dict[str, Any]]) -> Calibration:
    """Least squares in logarithms over all rows whose divergences mean something; each network type counts the same."""
    kept = [r for r in rows if min(r["imitated_divergence"], r["divergence"]) > SMALLEST]
    count = Counter(r["model"] for r in kept)
    weights = np.array([1 / count[r["model"]] for r in kept])
    x, y = (np.log([r[key] for r in kept]) for key in ("imitated_divergence", "divergence"))
    slope, shift = np.polyfit(x, y, 1, w=np.sqrt(weights))
    spread = np.sqrt(np.average((y - shift - slope * x) ** 2, weights=weights))
    return Calibration(float(shift), float(slope), float(spread), f"{len(kept)} rows of {dict(count)}")


def guess(row: dict[str, Any], calibration: Calibration) -> Prediction:
    """What would have been predicted for a row."""
    seen = Imitation(row["scheme"], row["imitated_divergence"], row["imitated_loss"], row["imitated_top1"], 0.0)
    return from_imitation(seen, row["clean_loss"], row["clean_top1"], int(row["images"]), row["fp_top1"], calibration)


def errors(rows: list[dict[str, Any]], calibration: Calibration) -> str:
    """Mean absolute error of top-1 in points, rank correlation, and the share of intervals that hold the truth."""
    from scipy.stats import spearmanr

    lines = ["| scheme | networks | lost, points | mean error | bias | in the 90 % interval | rank correlation |"]
    lines.append("|---" * 7 + "|")
    for scheme in [s for s in SCHEMES if any(r["scheme"] == s for r in rows)] + ["all"]:
        mine = [r for r in rows if scheme in (r["scheme"], "all")]
        guesses = [guess(r, calibration) for r in mine]
        off = [100 * (g.top1 - r["top1"]) for g, r in zip(guesses, mine, strict=True)]
        inside = [g.low <= r["top1"] <= g.high for g, r in zip(guesses, mine, strict=True)]
        lost = statistics.mean(100 * (r["fp_top1"] - r["top1"]) for r in mine)
        truth = [r["fp_top1"] - r["top1"] for r in mine]
        rank = spearmanr(truth, [r["fp_top1"] - g.top1 for g, r in zip(guesses, mine, strict=True)])[0]
        lines.append(
            f"| {scheme} | {len(mine)} | {lost:.1f} | {statistics.mean(map(abs, off)):.1f} | "
            f"{statistics.mean(off):+.1f} | {100 * statistics.mean(inside):.0f} % | {rank:.2f} |"
        )
    return "\n".join(lines)


def report(rows: list[dict[str, Any]]) -> None:
    """The constants from the embedded networks, and how wrong they are where they were not fitted."""
    embedded = [r for r in rows if r["model"] in ("convnet", "vit")]
    print("all embedded networks:", fit(embedded))
    for model in dict.fromkeys(r["model"] for r in rows):
        others = [r for r in embedded if r["model"] != model]
        mine = [r for r in rows if r["model"] == model]
        if others and mine:
            found = fit(others)
            print(
                f"\n{model}, predicted with constants from {', '.join(sorted({r['model'] for r in others}))}: {found}"
            )
            print(errors(mine, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--networks-folder", type=Path, default=Path("networks"))
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.fit:
        report(read(args.out))
        return
    torch.set_num_threads(args.threads)
    done = {(r["model"], r["arm"], int(r["seed"])) for r in read(args.out)} if args.out.exists() else set()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for name, arm, seed, *rest in networks(args):
            if (name, arm, seed) in done:
                continue
            for row in rows(name, arm, seed, *rest, args):
                writer.writerow({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            print(name, arm, seed, flush=True)


if __name__ == "__main__":
    main()
