"""Architectures of timm at their own widths and depths through planish: what low bits cover, what they change, and
whether the ONNX file says what PyTorch says.

    python benchmarks/architectures.py                    # -> benchmarks/architectures.csv, a row a network; resumes
    python benchmarks/architectures.py --table            # prints the table of docs/architectures.md
    python benchmarks/architectures.py --only resnet18    # some of them
    python benchmarks/architectures.py --judge resnet18   # -> architectures_judge.csv: the file and PyTorch in float32,
                                                          # both against PyTorch in float64

No published weights are used. A network with random weights gives nearly the same output for every picture, so that
top-1 would say nothing; here each network is made to say something first: BatchNorm gets the statistics of the images,
layer scales that begin near zero are set to 0.1, and the last layer is fitted by ridge regression to the labels of 256
embedded training images (Fashion-MNIST, enlarged). On 128 official test images that no step has seen the float network
is then right far more often than chance, and agreement with it is worth counting. It says nothing about trained
weights: those have outliers that random ones have not.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import planish
from planish.deploy.onnx.runtime import open_session
from planish.evaluation import predict
from planish.network import reestimate_batchnorm, watch

HERE = Path(__file__).parent
FIT, CALIBRATION, TEST, BATCH = 256, 32, 128, 32
RIDGE = 0.1  # times the mean square of a feature
SIZED = {"img_size": 64}
# architecture: (side of the images, arguments), the smallest of each family
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}), "resnet26": (64, {}), "resnext26ts": (64, {}), "seresnext26ts": (64, {}),
    "skresnet18": (64, {}), "resnest14d": (64, {}), "res2net50_48w_2s": (64, {}), "resnetv2_50": (64, {}),
    "regnetx_002": (64, {}), "regnety_002": (64, {}), "efficientnet_lite0": (64, {}), "efficientnet_b0": (64, {}),
    "tf_efficientnetv2_b0": (64, {}), "mobilenetv2_100": (64, {}), "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}), "mnasnet_100": (64, {}), "fbnetc_100": (64, {}), "lcnet_050": (64, {}),
    "tinynet_e": (64, {}), "ghostnet_050": (64, {}), "repghostnet_050": (64, {}), "rexnet_100": (64, {}),
    "densenet121": (64, {}), "dla46_c": (64, {}), "dpn48b": (64, {}), "hrnet_w18_small": (64, {}),
    "darknet17": (64, {}), "cspresnet50": (64, {}), "selecsls42b": (64, {}), "ese_vovnet19b_slim": (64, {}),
    "repvgg_a0": (64, {}), "gernet_s": (64, {}), "lambda_resnet26t": (64, {}), "nf_regnet_b0": (64, {}),
    "hgnetv2_b0": (64, {}), "starnet_s050": (64, {}), "fasternet_t0": (64, {}), "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}), "inception_next_atto": (64, {}), "mambaout_femto": (64, {}),
    "edgenext_xx_small": (64, {}), "mobilevit_xxs": (64, {}), "mobilevitv2_050": (64, {}), "repvit_m0_9": (64, {}),
    "efficientvit_b0": (64, {}), "shvit_s1": (64, {}), "swiftformer_xs": (64, {}), "fastvit_t8": (64, {}),
    "poolformer_s12": (64, {}), "pvt_v2_b0": (64, {}), "vit_tiny_patch16_224": (64, SIZED),
    "deit_tiny_distilled_patch16_224": (64, SIZED), "deit3_small_patch16_224": (64, SIZED),
    "beit_base_patch16_224": (64, {**SIZED, "depth": 4}), "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "vit_relpos_small_patch16_224": (64, SIZED), "convit_tiny": (64, SIZED), "pit_ti_224": (64, SIZED),
    "xcit_nano_12_p16_224": (64, SIZED), "levit_128s": (64, SIZED), "visformer_tiny": (64, SIZED),
    "mixer_s32_224": (224, {}), "swin_tiny_patch4_window7_224": (64, {**SIZED, "window_size": 4}),
}  # fmt: skip
COLUMNS = (
    "network", "side", "parameters", "float_top1", "agree_w8a8", "agree_w4a4", "error_w8a8", "error_w4a4",
    "low_bit_macs", "products", "integer_products", "file_agree", "file_largest", "seconds", "timm", "torch",
    "onnxruntime",
)  # fmt: skip


def _loader(data: Any, count: int, labels: list[int] | None = None) -> Any:
    chosen = torch.utils.data.Subset(data, range(count)) if labels is None else None
    chosen = chosen or planish.calibration_subset(data, labels, count)
    return planish.make_loader(chosen, BATCH, shuffle=False, seed=0)


@torch.no_grad()
def prepare(name: str, side: int, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The network, brought to say something about the images (see above), and the images."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, **options).eval()
    looks = planish.Preprocessing((3, side, side), (0.286,) * 3, (0.353,) * 3, crop_pct=1.0)
    model.planish_preprocessing = looks
    data = planish.load_data(None, looks)
    for parameter in model.parameters():
        if parameter.dim() < 4 and parameter.numel() > 1 and float(parameter.abs().max()) < 0.01 and parameter.any():
            parameter.copy_(torch.full_like(parameter, 0.1))
    images = _loader(data.train, FIT, data.train_labels)
    reestimate_batchnorm(model, [x for x, _ in images])
    head = model.get_submodule(watch(model, torch.zeros(1, 3, side, side)).products[-1].module)
    if isinstance(head, nn.Linear):
        _fit(model, head, images)
    return model, data


def _fit(model: nn.Module, head: nn.Linear, images: Any) -> None:
    """Ridge regression of the labels (as -1 and 1) on what enters the last layer."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    labels = predict(model, images)[1]
    handle.remove()
    x, y = torch.cat(seen), 2 * nn.functional.one_hot(labels, 10).double() - 1
    mean = x.mean(0)
    x = x - mean
    gram = x.T @ x
    weight = torch.linalg.solve(gram + RIDGE * len(x) * x.square().mean() * torch.eye(len(gram)).double(), x.T @ y).T
    head.weight.copy_(weight)
    head.bias = nn.Parameter((y.mean(0) - weight @ mean).float())


def measure(name: str) -> dict[str, Any]:
    """A row of the CSV."""
    side, options = NETWORKS[name]
    began = time.perf_counter()
    model, data = prepare(name, side, options)
    test, calibration = _loader(data.test, TEST), _loader(data.train, CALIBRATION, data.train_labels)
    logits, labels, _ = predict(model, test)
    row: dict[str, Any] = {
        "network": name, "side": side, "parameters": sum(p.numel() for p in model.parameters()),
        "float_top1": (logits.argmax(-1) == labels).float().mean().item(),
    }  # fmt: skip
    quantized = model
    for scheme in ("w8a8", "w4a4"):
        quantized = planish.quantize(model, calibration, scheme)
        mine = predict(quantized, test)[0]
        row[f"agree_{scheme}"] = (mine.argmax(-1) == logits.argmax(-1)).float().mean().item()
        spread = (logits - logits.mean(0)).square().mean().sqrt()
        row[f"error_{scheme}"] = ((mine - logits).square().mean().sqrt() / spread).item()
    shares = planish.ledger(quantized).shares
    with tempfile.TemporaryDirectory() as folder:
        done = planish.export(quantized, Path(folder) / "m.onnx", images=test)
    row |= {
        "low_bit_macs": shares.get("w4a4", 0.0) + shares.get("a4a4", 0.0), "products": len(done.forms),
        "integer_products": len(done.forms) - len(done.in_float), "file_agree": done.agreement.top1,
        "file_largest": done.agreement.largest / mine.std().item(),
    }  # fmt: skip
    import onnxruntime

    row |= {"seconds": time.perf_counter() - began, "timm": timm.__version__, "torch": torch.__version__}
    return row | {"onnxruntime": onnxruntime.__version__}


@torch.no_grad()
def judge(name: str) -> dict[str, Any]:
    """How far the network at w4a4 agrees with itself in float64, in PyTorch's float32 and in ONNX Runtime."""
    model, data = prepare(name, *NETWORKS[name])
    test, calibration = _loader(data.test, TEST), _loader(data.train, CALIBRATION, data.train_labels)
    quantized = planish.quantize(model, calibration, "w4a4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        planish.export(quantized, path, images=test)
        session = open_session(path)
        theirs = torch.cat([torch.from_numpy(session.run(None, {"images": x.numpy()})[0]) for x, _ in test])
    ours = predict(quantized, test)[0]
    precise = torch.cat([quantized.double()(x.double()).float() for x, _ in test])

    def same(a: Tensor, b: Tensor) -> float:
        return (a.argmax(-1) == b.argmax(-1)).float().mean().item()

    apart = (theirs - ours).abs().median() / ours.std()
    return {
        "network": name, "float32_float64": same(ours, precise), "file_float64": same(theirs, precise),
        "file_float32": same(theirs, ours), "file_float32_median_difference": apart.item(),
    }  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    """The table of the page, from the rows of the CSV."""
    heads = ("network", "side", "parameters", "float top-1", "same as float, w8a8", "w4a4", "error, w8a8", "w4a4",
             "MACs at 4 bits", "products on integer kernels", "file as PyTorch", "largest difference")  # fmt: skip
    rows = sorted(rows, key=lambda row: list(NETWORKS).index(row["network"]))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["network"], row["side"], f"{int(row['parameters']) / 1e6:.1f} M"]
        cells += [f"{100 * float(row[key]):.1f}" for key in ("float_top1", "agree_w8a8", "agree_w4a4")]
        cells += [f"{float(row[key]):.3f}" for key in ("error_w8a8", "error_w4a4")]
        cells += [f"{100 * float(row['low_bit_macs']):.1f}", f"{row['integer_products']} of {row['products']}"]
        cells += [f"{100 * float(row['file_agree']):.1f}", f"{float(row['file_largest']):.1g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "architectures.csv")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--judge", nargs="+", default=[])
    options = parser.parse_args()
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    if options.table:
        print(table(rows))
        return
    torch.set_num_threads(1)
    if options.judge:
        with (HERE / "architectures_judge.csv").open("w", newline="") as file:
            found = [judge(name) for name in options.judge]
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in found])
        return
    known = {row["network"] for row in rows}
    for name in [name for name in options.only if name not in known]:
        try:
            row = measure(name)
        except planish.PlanishError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        print(f"{name}: {row['seconds']:.0f} s, same class {row['agree_w4a4']:.3f}", flush=True)


if __name__ == "__main__":
    main()
