"""Curvature beside PyHessian and curvlinops: same networks, images, parameters, probes; values and seconds.

    pip install curvlinops-for-pytorch pyhessian
    python benchmarks/curvature.py            # both embedded networks -> benchmarks/curvature.csv

Hutchinson's trace is without planish's subspace here, so that all do the same work on the same signs; "trace, subspace"
is what ``curvature`` reports: Lanczos first, then the probes. Tasks take turns in a new order each round, in one
process on one thread. Seconds are those of the processor, which depend little on what else runs; the ratio to planish
is taken within a round, and each tool's own time is the median.

``pyhessian`` is given one batch, the case in which it keeps its graph, too; ``pyhessian, loader`` the batches.
``curvlinops`` differentiates with torch.func, whose second derivatives of LayerNorm are wrong in PyTorch 2.15 (see
tests/flatness/hessians.py); ``curvlinops, spelled out`` sees LayerNorm as a formula. All attention runs on the math
kernel. PyHessian finds eigenvalues by power iteration with deflation (its defaults: at most 100 steps each,
tolerance 1e-3), curvlinops by SciPy's eigsh (tolerance 1e-4).
"""

from __future__ import annotations

import argparse
import copy
import csv
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from csv_rows import write_rows
from curvlinops import HessianLinearOperator
from pyhessian import hessian as PyHessian
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.data import load_data, make_loader
from planish.flatness.curvature import curvature
from planish.flatness.hessian import Hessian
from planish.flatness.lanczos import lanczos
from planish.flatness.trace import Estimate, trace_samples
from planish.models import load_model

TOLERANCE = 1e-4
Result = tuple[list[float], float, int]  # values, standard error, products with the Hessian


class SpelledOut(nn.Module):
    """LayerNorm by its formula."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def spelled_out(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SpelledOut(module))
    return model


def planish_trace(model: nn.Module, batches: list[Any], probes: int, seed: int) -> Result:
    generator = torch.Generator().manual_seed(seed)
    found = Estimate.of(trace_samples(Hessian(model, batches), probes, generator=generator).sum(1))
    return [found.value], found.error, probes


def planish_subspace(model: nn.Module, batches: list[Any], probes: int, seed: int) -> Result:
    found = curvature(model, batches=batches, probes=probes, seed=seed)
    return [found.trace.value], found.trace.error, probes + found.steps


def planish_top(model: nn.Module, batches: list[Any], count: int, seed: int) -> Result:
    generator = torch.Generator().manual_seed(seed)
    found = lanczos(Hessian(model, batches), 100, generator=generator, wanted=count, tolerance=TOLERANCE)
    return found.ritz()[0][:count].tolist(), 0.0, len(found.basis)


def pyhessian_of(model: nn.Module, batches: list[Any], loader: bool) -> Any:
    model.zero_grad()
    if loader:
        return PyHessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return PyHessian(model, nn.CrossEntropyLoss(), data=whole, cuda=False)


def pyhessian_trace(loader: bool) -> Callable[..., Result]:
    def run(model: nn.Module, batches: list[Any], probes: int, seed: int) -> Result:
        torch.manual_seed(seed)
        samples = pyhessian_of(model, batches, loader).trace(maxIter=probes, tol=0)
        return [float(np.mean(samples))], float(np.std(samples, ddof=1) / len(samples) ** 0.5), len(samples)

    return run


def pyhessian_top(model: nn.Module, batches: list[Any], count: int, seed: int) -> Result:
    torch.manual_seed(seed)
    values, _ = pyhessian_of(model, batches, False).eigenvalues(top_n=count)
    return values, 0.0, 0


def curvlinops_of(model: nn.Module, batches: list[Any]) -> HessianLinearOperator:
    parameters = list(model.parameters())
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)


def curvlinops_trace(model: nn.Module, batches: list[Any], probes: int, seed: int) -> Result:
    operator = curvlinops_of(model, batches)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(probes):  # its own hutchinson_trace has no standard error; it multiplies with all signs at once
        signs = torch.randint(0, 2, (operator.shape[1],), generator=generator).float() * 2 - 1
        samples.append(float(signs @ (operator @ signs)))
    return [statistics.fmean(samples)], statistics.stdev(samples) / probes**0.5, probes


def curvlinops_top(model: nn.Module, batches: list[Any], count: int, seed: int) -> Result:
    operator = curvlinops_of(model, batches)
    start = np.random.default_rng(seed).standard_normal(operator.shape[1])
    products = 0
    scipy_operator = operator.to_scipy()
    plain = scipy_operator._matvec

    def counting(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return plain(vector)

    scipy_operator._matvec = counting
    values = eigsh(scipy_operator, k=count, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)
    return sorted(values.tolist(), reverse=True), 0.0, products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--measures", nargs="+", default=["trace", "trace, subspace", "eigenvalues"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--eigenvalues", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of the traces")
    parser.add_argument("--eigenvalue-rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []  # those of other models and measures stay
    if args.out.exists():
        with args.out.open() as file:
            rows = [
                r for r in csv.DictReader(file) if r["model"] not in args.models or r["measure"] not in args.measures
            ]
    for name in args.models:
        rows += compare(name, args)
        rows.sort(key=lambda row: (row["model"], ["trace", "trace, subspace", "eigenvalues"].index(row["measure"])))
        write_rows(args.out, rows)


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    loaded = load_model(name)
    data = load_data(None, loaded.preprocessing)
    model = loaded.model.eval().requires_grad_()
    twin = spelled_out(model)
    every = make_loader(data.train, args.batch_size, shuffle=False, seed=0)
    batches = [batch for _, batch in zip(range(-(-args.images // args.batch_size)), every, strict=False)]
    tasks: dict[tuple[str, str], Callable[[int], Result]] = {}

    def add(measure: str, tool: str, run: Callable[..., Result], network: nn.Module, number: int) -> None:
        if measure in args.measures:
            tasks[measure, tool] = lambda seed: run(network, batches, number, seed)

    def add_curvlinops(measure: str, run: Callable[..., Result], number: int) -> None:
        add(measure, "curvlinops", run, model, number)
        if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            add(measure, "curvlinops, spelled out", run, twin, number)

    add("trace", "planish", planish_trace, model, args.probes)
    add("trace", "pyhessian", pyhessian_trace(False), model, args.probes)
    add("trace", "pyhessian, loader", pyhessian_trace(True), model, args.probes)
    add_curvlinops("trace", curvlinops_trace, args.probes)
    add("trace, subspace", "planish", planish_subspace, model, args.probes)
    add("eigenvalues", "planish", planish_top, model, args.eigenvalues)
    add("eigenvalues", "pyhessian", pyhessian_top, model, args.eigenvalues)
    add_curvlinops("eigenvalues", curvlinops_top, args.eigenvalues)
    seconds: dict[tuple[str, str], list[float]] = {task: [] for task in tasks}
    results: dict[tuple[str, str], Result] = {}
    for round_ in range(args.rounds):
        due = [task for task in tasks if task[0] != "eigenvalues" or round_ < args.eigenvalue_rounds]
        for task in random.Random(round_).sample(due, len(due)):
            began = time.process_time()
            with sdpa_kernel(SDPBackend.MATH):
                result = tasks[task](round_)
            seconds[task].append(time.process_time() - began)
            results.setdefault(task, result)  # values: those of the first round
            print(name, *task, round_, round(seconds[task][-1], 2), result, flush=True)
    return [row(name, task, results[task], seconds, args, batches, model) for task in tasks]


def row(
    name: str, task: tuple[str, str], result: Result, seconds: dict[tuple[str, str], list[float]],
    args: argparse.Namespace, batches: list[Any], model: nn.Module,
) -> dict[str, Any]:  # fmt: skip
    measure, tool = task
    values, error, products = result
    own = seconds["trace" if measure.startswith("trace") else measure, "planish"]  # "trace, subspace" needs "trace"
    ratios = [a / b for a, b in zip(seconds[task], own, strict=True)]
    return {
        "model": name, "measure": measure, "tool": tool, "values": " ".join(f"{value:.6g}" for value in values),
        "error": f"{error:.3g}" if measure.startswith("trace") else "", "products": products or "",
        "seconds": round(statistics.median(seconds[task]), 2), "ratio_to_planish": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2), "rounds": len(ratios),
        "images": sum(len(labels) for _, labels in batches), "batch_size": args.batch_size,
        "weights": sum(p.numel() for p in model.parameters()), "threads": 1, "torch": torch.__version__,
        "pyhessian": version("PyHessian"), "curvlinops": version("curvlinops-for-pytorch"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
