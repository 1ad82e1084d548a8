"""Exported files: do they say what PyTorch says, how large are they, and how fast beside fp32 and ONNX Runtime's int8.

    python benchmarks/export.py agreement --out benchmarks/export_agreement.csv   # embedded networks, real ones
    python benchmarks/export.py latency --out benchmarks/export_latency.csv       # four networks at 224 px

Agreement: 2,000 test images on the embedded networks; on the real ones (weights: see ``benchmarks/ptq.py``) all 500
photographs, where float64 judges only the images on which file and PyTorch differ. Calibrated on the first batch (128
and 50 images). Latency: one thread, median, files take turns in one process; leave the machine alone meanwhile. The
weights are random there, which changes no time; sizes are the files'.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from ptq import NETWORKS, PHOTOGRAPHED
from torch import nn

from planish.deploy.card import INPUT
from planish.deploy.integers import integer_model
from planish.deploy.onnx.export import export
from planish.deploy.onnx.runtime import compare, milliseconds, open_session, quantize_static
from planish.models import Preprocessing
from planish.network import detach
from planish.ptq import HalveConstants, get_method, quantize

SCHEMES = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {}, ", outputs at 8 bits": {"output_bits": 8}, ", constants in half": {"constants": "half"},
}  # fmt: skip
TIMED = ("resnet18", "efficientnet_lite0", "vit_small_patch16_224", "vit_tiny_patch16_224")


def agreement(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every network and scheme: exact, and on the embedded ones with 8-bit outputs and with constants in half."""
    for name in args.networks or ["convnet", "vit"]:
        material, real = NETWORKS[name](name, 0, args), name in PHOTOGRAPHED
        calibration, given = material.calibration[:1], list(material.test)
        if real:  # both halves of the photographs
            given = [*material.labelled, *given]
        images, labels = (torch.cat(parts)[: args.images] for parts in zip(*given, strict=True))
        for scheme in args.schemes:
            passes = get_method(args.method).passes()
            model = quantize(material.model, calibration, scheme, passes)
            cases: list[tuple[nn.Module, dict[str, Any]]] = [(model, {})]
            if not real:  # minutes each
                cases.append((model, {"output_bits": 8, "calibration": calibration}))
                halved = quantize(material.model, calibration, scheme, [*passes, HalveConstants()])
                cases.append((halved, {"constants": "half"}))
            for network, options in cases:
                found = compared(network, images, labels, options, real)
                if found is not None:
                    yield {"network": name, "method": args.method, "scheme": scheme} | found


@torch.no_grad()
def compared(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, options: dict[str, Any], real: bool
) -> dict[str, Any] | None:
    """The exported file beside PyTorch in float32 and in float64; ``None`` if the options change nothing.

    ``real``: an image takes long, so that float64 judges only those on which the two differ.
    """
    parts, shape = list(images.split(100)), tuple(images.shape[1:])
    looks = Preprocessing(shape, (0.5,) * shape[0], (0.5,) * shape[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        done = export(model, path, images=parts, preprocessing=looks, **options)
        if "output_bits" in options and not done.output_grids:
            return None
        session = open_session(path)
        file = torch.cat([torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0]).argmax(1) for x in parts])
        integers = "" if real or options else len(compare(integer_model(model), session, parts).differing)
    own = torch.cat([model(x).argmax(1) for x in parts])
    judged = file != own if real else torch.ones_like(own, dtype=torch.bool)
    twin = copy.deepcopy(model).double()  # what the network says when rounding plays no part
    exact = torch.cat(
        [torch.empty(0, dtype=torch.long), *(twin(x.double()).argmax(1) for x in images[judged].split(100))]
    )
    return {
        "output_bits": options.get("output_bits", ""), "constants": options.get("constants", "float"),
        "images": done.agreement.images, "top1": f"{float((file == labels).float().mean()):.4f}",
        "pytorch_top1": f"{float((own == labels).float().mean()):.4f}",
        "differing": len(done.agreement.differing), "beyond_1e-3": len(done.agreement.beyond_ties),
        "margins": " ".join(f"{margin:.4f}" for _, margin in done.agreement.differing[:10]),
        "largest_difference": f"{done.agreement.largest:.3g}", "differing_from_integer_reference": integers,
        "differing_from_float64": int((file[judged] != exact).sum()),
        "pytorch_differing_from_float64": int((own[judged] != exact).sum()), "bytes": done.bytes,
        "integer_products": sum(not f.why for f in done.forms), "float_products": len(done.in_float),
        "onnxruntime": onnxruntime.__version__, "torch": torch.__version__,
    }  # fmt: skip


def network(name: str, images: torch.Tensor) -> nn.Module:
    """A network with random weights whose norms have seen the images, and no branch that is zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).train()
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.any():
            nn.init.normal_(parameter, 0.2, 0.3)
    with torch.no_grad():
        model(images)
    return model.eval()


def latency(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Milliseconds at batch 1 and 16, and bytes."""
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    looks = Preprocessing()
    for name in args.networks or TIMED:
        given = network(name, images)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            files = {"fp32": folder / "fp32.onnx", "onnxruntime int8": folder / "int8.onnx"}
            export(given, files["fp32"], preprocessing=looks)
            quantize_static(files["fp32"], files["onnxruntime int8"], [images[:4]])
            for scheme in args.schemes:
                model = quantize(given, [images[:4]], scheme)
                for label, options in VARIANTS.items():
                    done = export(
                        model, folder / f"{scheme}{label}.onnx", images=[images[:2]], calibration=[images[:4]],
                        preprocessing=looks, **options,
                    )  # fmt: skip
                    if "output_bits" not in options or done.output_grids:
                        files[f"{scheme}{label}"] = done.path
                detach(model)
            for batch in args.batches:
                taken = milliseconds(files, looks.input_size, batch, repeats=args.repeats)
                for label, path in files.items():
                    yield {
                        "network": name, "file": label, "batch": batch, "ms": f"{taken[label]:.2f}",
                        "of_fp32": f"{taken[label] / taken['fp32']:.3f}", "bytes": path.stat().st_size,
                        "size_of_fp32": f"{path.stat().st_size / files['fp32'].stat().st_size:.4f}", "threads": 1,
                        "repeats": args.repeats, "processor": processor(), "onnxruntime": onnxruntime.__version__,
                    }  # fmt: skip


def processor() -> str:
    """What of the processor decides on the kernels of integers and of bfloat16."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "amx_bf16")
    found = [flag for flag in known if f" {flag}" in flags]
    return "x86-64 " + " ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["agreement", "latency"])
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--method", default="rtn", help="of the agreement: how the networks are quantized")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.schemes = args.schemes or (SCHEMES if args.what == "agreement" else ("w4a4", "w2a4"))
    torch.set_num_threads(1)
    rows = (agreement if args.what == "agreement" else latency)(args)
    fresh = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, row)
                if fresh:
                    writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
