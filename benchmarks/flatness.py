"""Which measure of flatness tells how much a network loses at few bits: every arm and seed of the evidence study.

    python benchmarks/evidence/study.py --networks-folder NETWORKS       # the networks, and what they lose
    python benchmarks/flatness.py --networks-folder NETWORKS             # -> benchmarks/flatness.csv, continued
    python benchmarks/flatness.py --summary                              # rank correlations

Every measure is taken on 256 training images (balanced over the classes, drawn by the seed), without looking at test
images. The accuracy lost is that of calibrated rounding on the 2,000 official test images (study.csv). Spearman's rank
correlation, over the networks of one type (they have the same layers), and over both types together.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish.data import calibration_subset, load_data, make_loader
from planish.flatness.curvature import curvature
from planish.flatness.imitation import imitate
from planish.flatness.landscape import landscape_line
from planish.flatness.responses import noise_response, rounding_path
from planish.flatness.sharpness import sam_sharpness, worst_rounding
from planish.flatness.split import split_loss
from planish.flatness.subject import Subject
from planish.models import fit_weights, load_model, read_weights
from planish.training.regularizers import kurtosis

SCHEMES = ("w4a4", "w3a3")


def of_the_network(subject: Subject) -> Iterator[tuple[str, Callable[[], float]]]:
    """Measures that know nothing of a scheme."""
    found: dict[str, Any] = {}

    def curve() -> Any:
        if "curvature" not in found:
            found["curvature"] = curvature(subject, probes=24, steps=40, seed=0)
        return found["curvature"]

    def clean() -> float:
        return subject.losses().mean().item()

    def weights() -> list[torch.Tensor]:
        return [subject.model.get_submodule(s.owner)._parameters[s.slot] for s in subject.sites if s.is_weight]  # type: ignore[misc]

    yield "loss in float", clean
    yield "Hessian trace", lambda: curve().trace.value
    yield "largest eigenvalue", lambda: curve().eigenvalues[0]
    yield (
        "trace times squared norm",
        lambda: sum(layer.trace * w.square().mean().item() for layer, w in zip(curve().layers, weights(), strict=True)),
    )
    yield "SAM, rho 0.05", lambda: sam_sharpness(subject, 0.05).increase
    yield "ASAM, rho 0.5", lambda: sam_sharpness(subject, 0.5, adaptive=True).increase
    yield "landscape at 0.4, filter-normalized", lambda: landscape_line(subject, (0.4,), draws=4)[0].loss - clean()
    yield "kurtosis of weights", lambda: sum(kurtosis(w.double()).item() for w in weights()) / len(weights())
    yield "largest weight over rms", lambda: sum(_peak(w) for w in weights()) / len(weights())


def of_a_scheme(subject: Subject, scheme: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """Measures that look at the scheme's grids."""
    found: dict[str, Any] = {}

    def parts() -> Any:
        if "split" not in found:
            found["split"] = split_loss(subject, scheme, per_layer=False)
        return found["split"]

    def noise(where: str) -> float:
        return noise_response(subject, scheme, (0.289,), draws=4, where=where)[0].loss - subject.losses().mean().item()

    def along() -> float:
        first, last = rounding_path(subject, scheme, (0.0, 1.0))
        return last.loss - first.loss

    yield "loss along w to Q(w)", along
    yield "worst corner of the rounding box", lambda: worst_rounding(subject, scheme).increase
    yield "noise of a rounding error, weights", lambda: noise("weights")  # s / sqrt(12)
    yield "noise of a rounding error, activations", lambda: noise("activations")
    yield "Taylor, weights", lambda: parts().taylor_weights
    yield "Taylor, activations", lambda: parts().taylor_activations
    yield "Taylor, both", lambda: parts().taylor_weights + parts().taylor_activations
    yield "imitated rounding", lambda: imitate(subject, scheme, draws=4).divergence
    yield "rounding itself, on training images", lambda: parts().both


def _peak(w: torch.Tensor) -> float:
    rows = w.double().flatten(1)
    return (rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp(min=1e-12)).mean().item()


def networks(folder: Path, names: list[str]) -> Iterator[tuple[str, str, str, nn.Module, list[Any]]]:
    for name in names:
        loaded = load_model(name)
        for path in sorted(folder.glob(f"{name}-*.safetensors")):
            _, arm, seed = path.stem.split("-", 2)
            data = load_data(None, loaded.preprocessing, seed=int(seed))
            subset = calibration_subset(data.train, data.train_labels, 256, int(seed))
            model = copy.deepcopy(loaded.model)
            fit_weights(model, read_weights(path)[0], name=arm, source=path)
            yield name, arm, seed, model.eval(), list(make_loader(subset, 128, shuffle=False, seed=0))


def summary(path: Path, study: Path) -> str:
    """A table: measures, best first, with their rank correlation at each scheme."""
    from scipy.stats import spearmanr

    lost = {}
    with study.open() as file:
        for row in csv.DictReader(file):
            if row["method"] == "rtn":
                label = row["arm"].replace(",", "").replace(" ", "_")
                lost[row["model"], label, row["seed"], row["scheme"]] = float(row["fp_top1"]) - float(row["top1"])
    values: dict[tuple[str, str], dict[tuple[str, str, str], float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for scheme in [row["scheme"]] if row["scheme"] else SCHEMES:
                network = (row["model"], row["arm"], row["seed"])
                if (*network, scheme) in lost:
                    values.setdefault((row["measure"], scheme), {})[network] = float(row["value"])
    lines, groups = [], [("convnet",), ("vit",), ("convnet", "vit")]
    for measure in dict.fromkeys(key[0] for key in values):
        cells = []
        for scheme in SCHEMES:
            for group in groups:
                mine = {k: v for k, v in values.get((measure, scheme), {}).items() if k[0] in group}
                truth = [lost[(*k, scheme)] for k in mine]
                cells.append(spearmanr(list(mine.values()), truth)[0] if len(mine) > 3 else float("nan"))
        lines.append((measure, cells))
    count = {group: len({k for (_, s), v in values.items() for k in v if k[0] in group}) for group in groups}
    lines.sort(key=lambda line: -min(line[1][0], line[1][1], line[1][3], line[1][4]))
    head = "| measure | " + " | ".join(f"{s}, {' + '.join(g)} ({count[g]})" for s in SCHEMES for g in groups) + " |"
    table = [head, "|---" * (1 + len(SCHEMES) * len(groups)) + "|"]
    table += [f"| {measure} | " + " | ".join(f"{cell:+.2f}" for cell in cells) + " |" for measure, cells in lines]
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--networks-folder", type=Path, default=Path("networks"))
    parser.add_argument("--study", type=Path, default=Path(__file__).parent / "evidence" / "study.csv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        print(summary(args.out, args.study))
        return
    torch.set_num_threads(args.threads)
    done = set()
    if args.out.exists():
        with args.out.open() as file:
            done = {(r["model"], r["arm"], r["seed"]) for r in csv.DictReader(file)}
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(["model", "arm", "seed", "scheme", "measure", "value", "seconds", "images", "torch"])
        for name, arm, seed, model, images in networks(args.networks_folder, args.networks):
            if (name, arm, seed) in done:
                continue
            subject = Subject.prepare(model, images, SCHEMES)
            rows = []
            plans = [("", of_the_network(subject)), *((s, of_a_scheme(subject, s)) for s in SCHEMES)]
            for scheme, measures in plans:
                for measure, take in measures:
                    began = time.perf_counter()
                    value = take()
                    seconds = round(time.perf_counter() - began, 2)
                    rows.append([name, arm, seed, scheme, measure, f"{value:.8g}", seconds, 256, torch.__version__])
            writer.writerows(rows)
            file.flush()
            print(name, arm, seed, f"{sum(row[6] for row in rows):.0f} s", flush=True)


if __name__ == "__main__":
    main()
