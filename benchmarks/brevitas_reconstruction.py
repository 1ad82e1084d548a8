"""What an iteration of a block's reconstruction costs here and in Brevitas, and the error that is left.

    pip install brevitas                            # in an environment of its own, beside planish
    python benchmarks/brevitas_reconstruction.py    # -> benchmarks/brevitas_reconstruction.csv

One residual block of two 3 x 3 convolutions (16 channels at 28 x 28, BatchNorm folded), 512 images, batches of 64. Both
learn the roundings of its weights with a stretched sigmoid; planish (``adaround``, and ``genie`` with activation
dropping) beside Brevitas' learned round (``apply_learned_round``, block by block, hard sigmoid, squared error: its
penalty is for single layers). An iteration costs (the time of many) minus (the time of few), divided by the difference,
so that caches and calibration drop out. The two take turns in one process. The error is that of the block's output
against the float block's, with weights and inputs quantized, as a share of the variance of the output.
"""

from __future__ import annotations

import argparse
import copy
import csv
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # how Brevitas is used

from planish.ptq import Calibrate, Reconstruct, Round, quantize


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-20."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu2(x + self.conv2(self.relu1(self.conv1(x))))
        return out


def network(width: int) -> nn.Module:
    """A stem, the block, and a head: the first and the last layer have 8 bits."""
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(1, width, 3, padding=1), "relu": nn.ReLU(), "layer1": Block(width),
              "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(width, 10)}  # fmt: skip
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.eval()


def ours(learner: str, drop: float) -> Callable[..., nn.Module]:
    """A way of planish."""

    def run(model: nn.Module, batches: list[Tensor], bits: int, iterations: int, batch: int) -> nn.Module:
        step = Reconstruct(learner=learner, drop=drop, iterations=iterations, batch=batch)
        return quantize(model, batches, f"w{bits}a{bits}", [Calibrate(), Round(), step])

    return run


def theirs(model: nn.Module, batches: list[Tensor], bits: int, iterations: int, batch: int) -> nn.Module:
    """Brevitas, its layers quantized with its own ranges."""
    from brevitas_examples.imagenet_classification.ptq.learned_round_utils import apply_learned_round
    from brevitas_examples.imagenet_classification.ptq.ptq_common import calibrate, quantize_model
    from run_brevitas import without_amp

    images = torch.cat(batches)
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.long)), batch_size=batch)
    quantized = quantize_model(
        copy.deepcopy(model), backend="layerwise", weight_bit_width=bits, act_bit_width=bits, bias_bit_width=None,
        weight_quant_granularity="per_channel", act_quant_percentile=99.9, act_quant_type="asym",
        scale_factor_type="float_scale", quant_format="int", weight_param_method="mse", act_param_method="mse",
    )  # fmt: skip
    quantized.eval()
    with torch.no_grad():
        quantized(batches[0])
    calibrate(loader, quantized)
    options = argparse.Namespace(
        learned_round="hard_sigmoid", learned_round_mode="blockwise", learned_round_loss="mse",
        learned_round_lr=1e-2, learned_round_iters=iterations, learned_round_batch_size=batch,
        learned_round_lr_scheduler=None,
    )  # fmt: skip
    without_amp(lambda: apply_learned_round(quantized, loader, options))
    return quantized


ARMS: dict[str, Callable[..., nn.Module]] = {
    "planish adaround": ours("adaround", 0.0), "planish genie, dropping": ours("genie", 0.5), "brevitas": theirs,
}  # fmt: skip


def left(quantized: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    """The error of the block's output in the whole quantized network, as a share of the output's variance."""
    kept: dict[str, list[Tensor]] = {"exact": [], "rounded": []}
    for name, network in (("exact", model), ("rounded", quantized)):
        handle = network.get_submodule("layer1").register_forward_hook(lambda m, a, out, n=name: kept[n].append(out))
        with torch.no_grad():
            for batch in batches:
                network(batch)
        handle.remove()
    exact, rounded = (torch.cat(kept[name]) for name in ("exact", "rounded"))
    return float((exact - rounded).square().mean() / exact.var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, nargs=2, default=[40, 240])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    import brevitas

    torch.set_num_threads(args.threads)
    model = network(args.width)
    batches = list(torch.randn(512, 1, 28, 28, generator=torch.Generator().manual_seed(0)).split(args.batch))
    few, many = args.iterations
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    errors: dict[str, float] = {}
    for _ in range(args.repeats):
        for arm, run in ARMS.items():
            seconds = []
            for count in (few, many):
                began = time.perf_counter()
                quantized = run(model, batches, args.bits, count, args.batch)
                seconds.append(time.perf_counter() - began)
            times[arm].append(1e3 * (seconds[1] - seconds[0]) / (many - few))
            errors[arm] = left(quantized, model, batches)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "ms_per_iteration", "lowest", "highest", "error_left", "iterations", "bits", "width",
                         "batch", "threads", "peak_memory_mb", "torch", "brevitas"])  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        for arm, values in times.items():
            line = [arm, *(f"{v:.2f}" for v in (statistics.median(values), min(values), max(values))),
                    f"{errors[arm]:.5f}", many, args.bits, args.width, args.batch, args.threads, f"{peak:.0f}",
                    torch.__version__, brevitas.__version__]  # fmt: skip
            writer.writerow(line)
            print(*line)


if __name__ == "__main__":
    main()
