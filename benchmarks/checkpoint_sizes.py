"""The size of checkpoints beside that of the fp32 parameters, and what it is made of.

Random weights, with biases and norms that are no constants; the first and last layer at 8 bits, as schemes have it.

    python benchmarks/checkpoint_sizes.py --out benchmarks/checkpoint_sizes.csv
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch

from planish.deploy.checkpoint import load, save
from planish.deploy.packed.content import content_of
from planish.models import Preprocessing
from planish.ptq import quantize

NETWORKS = ("resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224", "efficientnet_lite0")
SCHEMES = ("w8a8", "w4a4", "w3a3", "w2a4")


def row(name: str, scheme: str) -> dict[str, Any]:
    """Sizes as shares of the fp32 parameters; seconds to save (with the check) and to load."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.01 * torch.randn_like(parameter))
    whole = 4 * sum(p.numel() for p in model.parameters())
    images = torch.randn(2, 3, 224, 224)
    quantized = quantize(model, [images[:1]], scheme)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q.safetensors"
        began = time.perf_counter()
        save(quantized, path, preprocessing=Preprocessing())
        saved = time.perf_counter()
        loaded = load(path)
        seconds = saved - began, time.perf_counter() - saved
        size = path.stat().st_size
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
    content = content_of(quantized)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in content.tensors.values())
    codes = sum(content.tensors[key].numel() for key in content.head.packed)
    return {
        "network": name, "scheme": scheme, "fp32_mb": round(whole / 1e6, 3), "file_mb": round(size / 1e6, 3),
        "file_share": round(size / whole, 4), "codes_share": round(codes / whole, 4),
        "other_tensors_share": round((stored - codes) / whole, 4), "header_share": round((size - stored) / whole, 4),
        "save_seconds": round(seconds[0], 2), "load_seconds": round(seconds[1], 2), "torch": torch.__version__,
        "timm": timm.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, scheme) for name in args.networks for scheme in SCHEMES]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for one in rows:
        print(f"{one['network']} {one['scheme']}: {one['file_mb']} MB, {one['file_share']} of fp32")


if __name__ == "__main__":
    main()
