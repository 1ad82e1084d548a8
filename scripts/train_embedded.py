"""Train the two full-precision networks that planish ships, on all of Fashion-MNIST.

    python scripts/train_embedded.py vit     --out src/planish/models/weights
    python scripts/train_embedded.py convnet --out src/planish/models/weights

The data are the four idx files of Debian's ``dataset-fashion-mnist`` (MIT). The architectures are timm's: all that is
chosen here is the arguments of ``create_model``. ``--holdout N`` leaves out the last N training images (for choosing
settings without touching the test images); the shipped weights use none.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

NETWORKS = {
    "vit": {
        "architecture": "vit_tiny_patch16_224",
        "arguments": {
            "img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2,
            "class_token": False, "global_pool": "avg", "in_chans": 1, "num_classes": 10,
        },
    },
    "convnet": {
        "architecture": "resnet10t",
        "arguments": {
            "stem_width": 8, "layers": (2, 2, 2, 2), "channels": (16, 32, 48, 64), "output_stride": 8,
            "in_chans": 1, "num_classes": 10,
        },
    },
}  # fmt: skip
MEAN, STD = 0.2860, 0.3530


def read_idx(path: Path) -> torch.Tensor:
    raw = gzip.decompress(path.read_bytes())
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims).copy())


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift every image by up to 2 pixels and mirror half of them; ``images`` is ``(N, 1, 28, 28)``."""
    n = len(images)
    dy, dx = torch.randint(-2, 3, (2, n, 1), generator=generator)
    cols = torch.arange(28).expand(n, 28)
    cols = torch.where(torch.rand(n, 1, generator=generator) < 0.5, cols, 27 - cols) + 2 + dx
    rows = torch.arange(28).expand(n, 28) + 2 + dy
    return F.pad(images, (2, 2, 2, 2))[torch.arange(n)[:, None, None], 0, rows[:, :, None], cols[:, None, :]][:, None]


def build(network: str) -> torch.nn.Module:
    spec = NETWORKS[network]
    return timm.create_model(spec["architecture"], **spec["arguments"])


@torch.no_grad()
def top1(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True)) / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--holdout", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    def split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = read_idx(args.data / f"{name}-images-idx3-ubyte.gz")[:, None].float()
        return (images / 255 - MEAN) / STD, read_idx(args.data / f"{name}-labels-idx1-ubyte.gz").long()

    x, y = split("train")
    test_x, test_y = split("t10k")
    if args.holdout:
        test_x, test_y = x[-args.holdout :], y[-args.holdout :]
        x, y = x[: -args.holdout], y[: -args.holdout]

    model = build(args.network)
    if args.network == "vit":
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch, steps = 128, args.epochs * (len(x) // 128)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (t + 1) / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))),
    )
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch)
        for index in order:
            loss = F.cross_entropy(model(augment(x[index], generator)), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        print(f"{args.network} epoch {epoch + 1}/{args.epochs} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    measured = top1(model, test_x, test_y)
    print(f"{args.network} top-1 {measured:.4f} on {len(test_y)} images", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    card = dict(
        NETWORKS[args.network], mean=[MEAN], std=[STD], seed=args.seed, epochs=args.epochs,
        training_images=len(x), holdout=args.holdout, top1=measured, top1_images=len(test_y),
    )  # fmt: skip
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, args.out / f"{args.network}.safetensors", metadata={"planish": json.dumps(card)})


if __name__ == "__main__":
    main()
