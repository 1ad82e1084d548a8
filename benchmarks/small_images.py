"""CIFAR-10 (JPEG) and Tiny-ImageNet-100 at 32 x 32, and the networks on them that other benchmarks start from.

    python benchmarks/small_images.py --shared ../shared/data --out NETWORKS          # trains what is not there yet
    python benchmarks/qat.py --networks cifar10-resnet20 --small NETWORKS

The files are ``cifar10-train.npz`` and so on: images as JPEG, one after the other (``jpeg``, ``offsets``), with
``labels``. CIFAR-10 was re-encoded with loss (quality 75), so that no figure compares with published ones. Networks are
trained on all 50,000 training images; what other scripts do with them, they do on 10,000 of these.

To choose settings without the test images, train without some others, and measure on them:

    python benchmarks/small_images.py --shared ../shared/data --out HELD --held-out 5000
    python benchmarks/qat.py --networks cifar10-resnet20 --small HELD --held-out 5000 --out held.csv
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from train_embedded import read_idx

from planish.data import BatchedTensorDataset, calibration_subset, load_data, make_loader
from planish.data.load import ImageData
from planish.evaluation import evaluate
from planish.flattening import flatten, plain
from planish.models import Preprocessing, fit_weights, load_model, read_weights, save_weights
from planish.models.load import LoadedModel
from planish.models.weights import state_hash
from planish.training import TrainingSettings

LOOK = Preprocessing(input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616), crop_pct=1.0)
IMAGES = {"cifar10": "CIFAR-10 (JPEG)", "tin100": "Tiny-ImageNet-100, 32 px"}
KEPT = 10_000  # training images that the studies use


class ResNet20(nn.Module):
    """The ResNet-20 of He et al. (2015, section 4.2): 3 stages of 3 blocks, 16, 32 and 64 channels; 0.27 M parameters.

    Its stem takes every second row and column, so that a step costs a quarter: it computes at 16, 8 and 4 pixels.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks, before = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for index in range(3):
                stride = 2 if stage and not index else 1
                shortcut = None
                if before != width:
                    shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
                blocks.append(BasicBlock(before, width, stride, shortcut))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class ConvolutionalStem(nn.Module):
    """Three strided convolutions and a projection in place of one patch embedding (Xiao et al. 2021, arXiv 2106.14881).

    [N, 3, 32, 32] -> [N, 16, ``embed_dim``]: 16 tokens, so that a step costs a quarter of one with patches of 4 x 4.
    """

    def __init__(self, *, embed_dim: int, **_: Any) -> None:
        super().__init__()
        widths, layers = (3, 24, 48, 96), []
        for before, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))
        self.num_patches, self.grid_size = 16, (4, 4)  # timm reads them for the position embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)


def vit(num_classes: int) -> nn.Module:
    """A ViT of 1.3 M parameters: 16 tokens from a convolutional stem, 192 wide, 4 blocks."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=192, depth=4, num_heads=3, mlp_ratio=2,
        class_token=False, global_pool="avg", num_classes=num_classes, embed_layer=ConvolutionalStem,
    )  # fmt: skip


NETWORKS = {
    "resnet20": (ResNet20, TrainingSettings(lr=0.1, optimizer="sgd", weight_decay=5e-4, freeze_batchnorm=False)),
    "vit": (vit, TrainingSettings(lr=1e-3, optimizer="adamw", weight_decay=0.05, freeze_batchnorm=False)),
}
NAMES = [f"{images}-{network}" for images in IMAGES for network in NETWORKS]


def load_images(images: str, shared: Path, *, seed: int, most: int | None = KEPT, held_out: int = 0) -> ImageData:
    """The images of one set; ``most`` training images, the same for every seed and equally many of each class.

    ``held_out``: so many training images take the place of the test images; none of the ``KEPT`` is among them.
    """
    from PIL import Image

    def split(part: str) -> tuple[np.ndarray, list[int]]:
        file = np.load(shared / f"{images}-{part}.npz")
        ends, joined = file["offsets"], file["jpeg"].tobytes()
        decoded = [np.asarray(Image.open(io.BytesIO(joined[a:b])).convert("RGB")) for a, b in itertools.pairwise(ends)]
        return np.stack(decoded).transpose(0, 3, 1, 2).copy(), file["labels"].astype(int).tolist()

    def of(indices: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        return train[list(indices)], [labels[i] for i in indices]

    train, labels = split("train")
    everything = BatchedTensorDataset(train, labels, LOOK)
    used = range(len(labels)) if most is None else calibration_subset(everything, labels, most, 0).indices
    held = _held(everything, labels, held_out) if held_out else []
    test, test_labels = of(held) if held else split("test")
    without = set(held)
    train, labels = of([i for i in used if i not in without])
    return ImageData(
        train=BatchedTensorDataset(train, labels, LOOK, seed=seed), test=BatchedTensorDataset(test, test_labels, LOOK),
        classes=[str(c) for c in range(max(labels) + 1)], name=IMAGES[images], train_labels=labels,
    )  # fmt: skip


def _held(everything: BatchedTensorDataset, labels: list[int], count: int) -> list[int]:
    """So many images that no study uses, drawn at random: the files are sorted by class."""
    studied = set(calibration_subset(everything, labels, KEPT, 0).indices)
    others = torch.tensor([i for i in range(len(labels)) if i not in studied])
    drawn: list[int] = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(7))[:count]].tolist()
    return drawn


def load_small(
    name: str, folder: Path, shared: Path, seed: int, most: int | None = KEPT, held_out: int = 0
) -> tuple[LoadedModel, ImageData]:
    """A trained network by its name (``"cifar10-resnet20"``) and ``most`` of its training images (``None``: all)."""
    images, network = name.split("-")
    data = load_images(images, shared, seed=seed, most=most, held_out=held_out)
    model = NETWORKS[network][0](len(data.classes))
    path = folder / f"{name}.safetensors"
    weights, card = read_weights(path)
    trained_without = json.loads(card.get("planish", "{}")).get("held_out", 0)
    if trained_without != held_out:
        raise SystemExit(f"{path} was trained without {trained_without} images, not without {held_out}: see --held-out")
    fit_weights(model, weights, name=name, source=path)
    return LoadedModel(model.eval(), name, LOOK, state_hash(model), {"kind": "none"}), data


def load_network(
    name: str, seed: int, args: argparse.Namespace, *, everything: bool = False
) -> tuple[LoadedModel, ImageData]:
    """A network of this file or of the package, and its images; ``args`` has what :func:`add_arguments` added.

    ``everything``: with all images that the network was trained on, not 10,000 of them.
    """
    if name in NAMES:
        return load_small(name, args.small, args.shared, seed, None if everything else KEPT, args.held_out)
    if args.held_out:
        raise SystemExit(f"--held-out is for {', '.join(NAMES)}: nothing was held out from {name}")
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing, seed=seed)
    if everything:
        images, labels = (read_idx(args.fashion / f"train-{p}-ubyte.gz") for p in ("images-idx3", "labels-idx1"))
        data.train_labels = labels.tolist()
        data.train = BatchedTensorDataset(images, data.train_labels, loaded.preprocessing, seed=seed)
    return loaded, data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the networks and images of this file are."""
    parser.add_argument("--small", type=Path, default=Path("networks"), help="the networks of small_images.py")
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="the folder with the images")
    parser.add_argument("--held-out", type=int, default=0, help="measure on so many training images, see small_images")
    parser.add_argument(
        "--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"),
        help="files of Debian's dataset-fashion-mnist, for all images of the embedded networks",
    )  # fmt: skip


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; what is measured on held-out images does not go into the file of what test images gave."""
    args = parser.parse_args()
    if args.held_out and args.out == parser.get_default("out"):
        parser.error(f"--held-out measures on training images, {args.out} holds test images: give another --out")
    return args


def train(name: str, args: argparse.Namespace) -> None:
    """Train a network and keep it with what was done."""
    images, network = name.split("-")
    data = load_images(images, args.shared, seed=args.seed, most=None, held_out=args.held_out)
    torch.manual_seed(args.seed)
    build, settings = NETWORKS[network]
    model = build(len(data.classes))
    loader = make_loader(data.train, 128, shuffle=True, seed=args.seed, augment=True, drop_last=True)
    settings = replace(settings, epochs=args.epochs, seed=args.seed, mixed_precision=args.precision)
    began = time.perf_counter()

    def progress(step: int, steps: int, loss: float) -> None:
        if step % len(loader) == 0:
            print(
                f"{name}: epoch {step // len(loader)}, loss {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True
            )

    model = flatten(model, loader, settings=plain(settings), progress=progress)
    top1 = evaluate(model, make_loader(data.test, 500, shuffle=False, seed=0))["top1"]
    card: dict[str, Any] = {
        "top1": top1, "epochs": args.epochs, "seed": args.seed, "images": data.name, "precision": args.precision,
        "held_out": args.held_out,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    save_weights(model, args.out / f"{name}.safetensors", {"planish": json.dumps(card)})
    print(name, card, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="the folder with the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the networks")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=0, help="train without so many images, and measure on these")
    parser.add_argument("--precision", default="bf16", help="of the training: no or bf16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks:
        if not (args.out / f"{name}.safetensors").exists():
            train(name, args)


if __name__ == "__main__":
    main()
