r"""What an iteration of a block's reconstruction costs here, in Brevitas and in MCT, and the error that is left.

    PYTHONPATH=src BREVITAS/bin/python benchmarks/reconstruction_step.py --arms planish planish-dropping brevitas
    PYTHONPATH=src MCT/bin/python benchmarks/reconstruction_step.py --arms planish planish-dropping mct
    PYTHONPATH=src BREVITAS/bin/python benchmarks/reconstruction_step.py --lengths 8 16 32 64 120 240 440 880 \
        --arms planish-dropping planish-straight brevitas      # -> reconstruction_time.csv, and the same with mct

BREVITAS and MCT are the environments that ``tools/compare.py`` makes (and accelerate and torchmetrics). One residual
block of two 3 x 3 convolutions (16 channels at 28 x 28) between a stem and a 1 x 1 convolution with 8 bits, 512 images,
batches of 64. All learn the roundings of its weights with a stretched sigmoid: planish (``adaround``, and ``genie``
with activation dropping), Brevitas' learned round (block by block, hard sigmoid, squared error: its penalty is for
single layers), MCT's gradient-based quantization (the whole network at once). An iteration costs (the processor time of
many) minus (the time of few), divided by the difference, so that caches and calibration drop out; the arms take turns
in one process. The error is that of the network's output, as a share of its variance. Memory is what the highest
resident size of a process of its own grows by.

With ``--lengths`` every arm runs for so many iterations each, with several seeds, and what is written is the error that
is left and the processor time: that of the whole call, and without what the shortest one takes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.metadata
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from csv_rows import write_rows
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))  # how the tools are used

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
              "head": nn.Conv2d(width, 4, 1), "flatten": nn.Flatten()}  # fmt: skip
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.eval()


def ours(learner: str, drop: float) -> Callable[..., nn.Module]:
    """A way of planish."""

    def run(model: nn.Module, batches: list[Tensor], bits: int, iterations: int, batch: int) -> nn.Module:
        seed = torch.initial_seed()  # of the process, as for the other arms
        step = Reconstruct(learner=learner, drop=drop, iterations=iterations, batch=batch, seed=seed)
        return quantize(model, batches, f"w{bits}a{bits}", [Calibrate(), Round(), step])

    return run


def brevitas(model: nn.Module, batches: list[Tensor], bits: int, iterations: int, batch: int) -> nn.Module:
    """Brevitas' learned round, block by block, on the network as ``tools/run_brevitas.py`` prepares it."""
    import run_brevitas
    from judge import Task

    task = Task(model, torch.cat(batches), bits, bits, 0)
    quantized = run_brevitas.prepared(copy.deepcopy(model), task)
    options = argparse.Namespace(
        learned_round="hard_sigmoid", learned_round_mode="blockwise", learned_round_loss="mse",
        learned_round_lr=1e-2, learned_round_iters=iterations, learned_round_batch_size=batch,
        learned_round_lr_scheduler=None,
    )  # fmt: skip
    images = run_brevitas.loader(task)
    run_brevitas.without_amp(lambda: run_brevitas.rounding.apply_learned_round(quantized, images, options, r"layer\d+"))
    return quantized.eval()


def mct(model: nn.Module, batches: list[Tensor], bits: int, iterations: int, batch: int) -> nn.Module:
    """MCT, for as many epochs as make so many iterations."""
    import run_mct
    from judge import Task

    images = torch.cat(batches)
    run_mct.EPOCHS, run_mct.BATCH = iterations * batch // len(images), batch
    return run_mct.gptq(Task(copy.deepcopy(model), images, bits, bits, 0))  # type: ignore[return-value]


ARMS: dict[str, Callable[..., nn.Module]] = {
    "planish": ours("adaround", 0.0), "planish-dropping": ours("genie", 0.5), "planish-straight": ours("ste", 0.0),
    "brevitas": brevitas, "mct": mct,
}  # fmt: skip
PACKAGES = {"brevitas": "brevitas", "mct": "model_compression_toolkit"}


def material(args: argparse.Namespace) -> tuple[nn.Module, list[Tensor]]:
    """The network and its images."""
    images = torch.randn(512, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return network(args.width), list(images.split(args.batch))


def grown(arm: str, args: argparse.Namespace, answer: multiprocessing.Queue[float]) -> None:
    """Megabytes by which the highest resident size grows in this process."""
    torch.set_num_threads(args.threads)
    model, batches = material(args)
    Path("/proc/self/clear_refs").write_text("5")  # the highest size from here on
    before = highest()
    ARMS[arm](model, batches, args.bits, args.iterations[0], args.batch)
    answer.put(highest() - before)


def highest() -> float:
    """The highest resident size of this process, in megabytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


@torch.no_grad()
def left(quantized: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    """The error of the network's output, as a share of its variance."""
    exact, rounded = (torch.cat([net(batch) for batch in batches]) for net in (model, quantized))
    return float((exact - rounded).square().mean() / exact.var())


def by_length(args: argparse.Namespace) -> None:
    """Error and time of every arm for every number of iterations."""
    model, batches = material(args)
    for arm in args.arms:  # what is slow the first time
        ARMS[arm](model, batches, args.bits, 8, args.batch)
    out = args.out.with_name("reconstruction_time.csv")
    beside = next((PACKAGES[arm] for arm in args.arms if arm in PACKAGES), "")
    rows = [row for row in csv.DictReader(out.open()) if row["beside"] != beside] if out.exists() else []
    for seed in range(args.repeats):
        shortest: dict[str, float] = {}
        for length in sorted(args.lengths):
            for arm in args.arms:
                torch.manual_seed(seed)
                began = time.process_time()
                quantized = ARMS[arm](model, batches, args.bits, length, args.batch)
                seconds = time.process_time() - began
                learning = seconds - shortest.setdefault(arm, seconds)
                rows.append({
                    "beside": beside, "arm": arm, "iterations": str(length), "seed": str(seed),
                    "error_left": f"{left(quantized, model, batches):.5f}", "seconds": f"{seconds:.2f}",
                    "seconds_beyond_shortest": f"{learning:.2f}", "bits": str(args.bits), "width": str(args.width),
                    "batch": str(args.batch), "threads": str(args.threads),
                })  # fmt: skip
                print(*rows[-1].values(), flush=True)
    write_rows(out, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["planish", "planish-dropping", "brevitas"], choices=list(ARMS))
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, nargs=2, default=[40, 240])
    parser.add_argument("--lengths", type=int, nargs="+", help="numbers of iterations whose errors are compared")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.lengths:
        by_length(args)
        return
    model, batches = material(args)
    few, many = args.iterations
    times: dict[str, list[float]] = {arm: [] for arm in args.arms}
    errors: dict[str, float] = {}
    for arm in args.arms:  # what is slow the first time
        ARMS[arm](model, batches, args.bits, 8, args.batch)
    for _ in range(args.repeats):
        for arm in args.arms:
            seconds = []
            for count in (few, many):
                began = time.process_time()
                quantized = ARMS[arm](model, batches, args.bits, count, args.batch)
                seconds.append(time.process_time() - began)
            times[arm].append(1e3 * (seconds[1] - seconds[0]) / (many - few))
            errors[arm] = left(quantized, model, batches)
            print(arm, f"{times[arm][-1]:.2f} ms", f"{errors[arm]:.5f}", flush=True)
    beside = " ".join(arm for arm in args.arms if arm in PACKAGES)
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    rows = [row for row in rows if row["beside"] != beside]
    context = multiprocessing.get_context("spawn")
    for arm, values in times.items():
        answer: multiprocessing.Queue[float] = context.Queue()
        child = context.Process(target=grown, args=(arm, args, answer))
        child.start()
        memory = answer.get()
        child.join()
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", *PACKAGES.values())
                    if name == "torch" or name == PACKAGES.get(arm)]  # fmt: skip
        rows.append({
            "beside": beside, "arm": arm, "ms_per_iteration": f"{statistics.median(values):.2f}",
            "lowest": f"{min(values):.2f}", "highest": f"{max(values):.2f}", "memory_mb": f"{memory:.0f}",
            "error_left": f"{errors[arm]:.5f}", "iterations": str(many), "repeats": str(args.repeats),
            "bits": str(args.bits), "width": str(args.width), "batch": str(args.batch),
            "threads": str(args.threads), "versions": ", ".join(versions),
        })  # fmt: skip
        print(rows[-1])
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
