"""Are quantization errors independent Gaussians, and does the second-order formula hold?

    python benchmarks/evidence/study.py --networks-folder NETWORKS       # the networks
    python benchmarks/error_model.py --networks-folder NETWORKS          # -> benchmarks/error_model.csv, continued
    python benchmarks/error_model.py --summary                           # mean and standard error over the seeds

Both embedded networks as they were given and flattened, on 256 training images with labels (balanced, drawn by the
seed). Ranges are set on the same images.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from planish.data import calibration_subset, load_data, make_loader
from planish.flatness.errors import error_model
from planish.flatness.split import split_loss
from planish.flatness.subject import Subject
from planish.models import fit_weights, load_model, read_weights

SCHEMES = ("w8a8", "w4a4", "w3a3")
ARMS = ("given", "averaged", "flat")


def figures(subject: Subject, scheme: str) -> dict[str, float]:
    """Every figure of a network at a scheme."""
    from scipy.stats import spearmanr

    model, split = error_model(subject, scheme), split_loss(subject, scheme, draws=0)
    verdicts = Counter(site.verdict for site in model.sites)
    found: dict[str, float] = {
        f"sites {kind}": verdicts[kind] for kind in ("uniform", "gaussian", "clipped", "degenerate")
    }
    for role in ("weight", "input"):
        mine = [site for site in model.sites if site.role == role]
        found[f"variance over s^2/12, {role}s"] = statistics.median(site.variance_ratio for site in mine)
        found[f"the same without zeros, {role}s"] = statistics.median(site.variance_ratio_nonzero for site in mine)
    for name in ("weight_activation", "channels", "layers"):
        correlation = getattr(model.correlations, name)
        found[f"correlation {name}"], found[f"correlation {name}, by chance"] = correlation.value, correlation.chance
    for part in ("weights", "activations", "interaction"):
        found[part], found[f"{part}, Taylor"] = getattr(split, part), getattr(split, f"taylor_{part}")
    found["both"] = split.both
    for part in ("weights", "activations"):
        layers = [(getattr(one, part), getattr(one, f"taylor_{part}")) for one in split.layers]
        layers = [pair for pair in layers if pair[1]]
        found[f"layers ranked, {part}"] = spearmanr(*zip(*layers, strict=True))[0]
        found[f"sum over layers, {part}"] = sum(pair[0] for pair in layers)
    return found


def summary(path: Path) -> str:
    """A table for each network: figures against arm and scheme."""
    cells: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            cells[row["model"], row["figure"], row["arm"], row["scheme"]].append(float(row["value"]))

    def text(values: list[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{statistics.mean(values):.3g} ± {error:.1g}" if values else ""

    lines = []
    for model in dict.fromkeys(key[0] for key in cells):
        columns = [(a, s) for s in SCHEMES for a in ARMS if any(k[0] == model and k[2:] == (a, s) for k in cells)]
        lines.append(f"| {model} | " + " | ".join(f"{s} {a}" for a, s in columns) + " |")
        lines.append("|---" * (1 + len(columns)) + "|")
        for figure in dict.fromkeys(key[1] for key in cells if key[0] == model):
            lines.append(f"| {figure} | " + " | ".join(text(cells[(model, figure, *c)]) for c in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--networks-folder", type=Path, default=Path("networks"))
    parser.add_argument("--arms", nargs="+", default=["given", "flat"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        print(summary(args.out))
        return
    torch.set_num_threads(args.threads)
    done = set()
    if args.out.exists():
        with args.out.open() as file:
            done = {(r["model"], r["arm"], r["seed"]) for r in csv.DictReader(file)}
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(["model", "arm", "seed", "scheme", "figure", "value", "images", "torch"])
        for seed in args.seeds:
            for name in args.networks:
                for arm in args.arms:
                    if (name, arm, str(seed)) not in done:
                        for scheme, figure, value in measure(name, arm, seed, args.networks_folder):
                            writer.writerow([name, arm, seed, scheme, figure, f"{value:.6g}", 256, torch.__version__])
                        file.flush()
                        print(name, arm, seed, flush=True)


def measure(name: str, arm: str, seed: int, folder: Path) -> list[tuple[str, str, float]]:
    loaded: Any = load_model(name)
    data = load_data(None, loaded.preprocessing, seed=seed)
    subset = calibration_subset(data.train, data.train_labels, 256, seed)
    model = copy.deepcopy(loaded.model)
    if arm != "given":
        path = folder / f"{name}-{arm}-{seed}.safetensors"
        fit_weights(model, read_weights(path)[0], name=arm, source=path)
    subject = Subject.prepare(model.eval(), make_loader(subset, 128, shuffle=False, seed=0), SCHEMES)
    return [(scheme, figure, value) for scheme in SCHEMES for figure, value in figures(subject, scheme).items()]


if __name__ == "__main__":
    main()
