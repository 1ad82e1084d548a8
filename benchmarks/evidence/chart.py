"""The chart of docs/evidence.md: top-1 against bits, a column for each network, a row for each quantizer.

    python benchmarks/evidence/chart.py            # -> docs/evidence.png

The figures are those of study.csv.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from study import Cells, read_top1

from planish.report.svg import LIGHT, MARKERS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORKS = {
    "convnet": "convolutional,\nFashion-MNIST", "vit": "transformer,\nFashion-MNIST",
    "cifar10-resnet20": "ResNet-20,\nCIFAR-10 (JPEG)", "tin100-resnet20": "ResNet-20,\nTiny-ImageNet-100",
    "cifar10-vit": "ViT,\nCIFAR-10 (JPEG)", "tin100-vit": "ViT,\nTiny-ImageNet-100",
}  # fmt: skip
METHODS = {"rtn": "rounded to nearest", "matched": "matched", "fast": "fast"}
ARMS = ("given", "averaged", "asam", "kure", "flat", "flat, without labels", "flat, without labels, batch statistics")
SCHEMES = ("float", "w4a4", "w3a3", "w2a2")


def draw(axes: Axes, cells: Cells, network: str, method: str) -> None:
    """One network behind one quantizer; error bars are standard errors over the seeds."""
    for index, arm in enumerate(ARMS):
        points = [cells.get((network, method, arm, scheme), []) for scheme in SCHEMES]
        if not any(points[1:]):
            continue
        axes.errorbar(
            [x + 0.05 * (index - 3) for x in range(len(SCHEMES))],
            [statistics.mean(p) if p else float("nan") for p in points],
            yerr=[statistics.stdev(p) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in points],
            label=arm, color=LIGHT[index], marker=MARKERS[index], markersize=4.5, capsize=2, linewidth=1.4,
        )  # fmt: skip
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
    axes.set_xticks(range(len(SCHEMES)), SCHEMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path(__file__).with_name("study.csv"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/evidence.png")
    args = parser.parse_args()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cells = read_top1(args.study)
    with mpl.rc_context(style("#1d2127", "#d5d8de")):
        figure = Figure(figsize=(15, 8.5), layout="constrained", facecolor="white")
        grid = figure.subplots(len(METHODS), len(NETWORKS), sharex=True, sharey="col")
        for row, (method, title) in zip(grid, METHODS.items(), strict=True):
            for axes, (network, name) in zip(row, NETWORKS.items(), strict=True):
                draw(axes, cells, network, method)
                if method == "rtn":
                    axes.set_title(name, loc="left")
            row[0].set_ylabel(f"{title}\ntop-1 (%)")
        handles, names = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda found: len(found[1]))
        figure.legend(handles, names, loc="outside lower center", ncols=len(ARMS), frameon=False)
        figure.savefig(args.out, format="png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
