"""planish beside other tools: the same networks, calibration images and rule for the first and the last layer.

    python benchmarks/tools/compare.py --environments FOLDER              # -> benchmarks/tools/compare.csv, continued
    python benchmarks/tools/compare.py --environments FOLDER --tools brevitas planish --schemes w4a4
    python benchmarks/tools/compare.py --summary --seeds 0

Every tool gets a virtual environment of its own in FOLDER (some gigabytes each, made when it is missing) and runs in a
process for each row: 512 calibration images of Fashion-MNIST's training images drawn by the seed, no labels, one
thread; 2,000 official test images to measure on. Weights have a scale for each output channel, inputs of layers one
scale each, the first and the last layer keep 8 bits; where a tool departs from that, its ``run_TOOL.py`` says how, and
what it leaves in float. Schemes that a tool does not offer are not among its own in ``TOOLS``. Seconds are processor
time of the tool's calls, without imports and compilation. NNCF and quanto compile an extension at their first start and
keep it in torch's cache of extensions.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import venv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from csv_rows import continue_rows, scheme_table

HERE = Path(__file__).resolve().parent
ALL = ("w8a8", "w4a8", "w4a4", "w3a3", "w2a4", "w2a2")
FIELDS = ["network", "tool", "method", "scheme", "seed", "fp_top1", "top1", "agreement", "seconds", "threads",
          "versions", "error"]  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """What is installed, and which methods run at which schemes on which networks."""

    requirements: tuple[str, ...]
    methods: dict[str, tuple[str, ...]]  # method -> schemes that it supports
    only: dict[str, str] = field(default_factory=dict)  # method -> the one network that it is run on


TOOLS = {
    "planish": Tool(
        (str(HERE.parent.parent),), {"rtn": ALL, "matched": ALL, "fast": ALL, "best-cnn": ALL, "best-vit": ALL},
        {"best-cnn": "convnet", "best-vit": "vit"},
    ),
    "brevitas": Tool(("brevitas", "accelerate"), {"gptq": ALL, "gpfq": ALL, "learned-round": ALL}),
    "mct": Tool(("model_compression_toolkit",), {"gptq": ALL}),
    "aimet": Tool(("aimet-torch",), {"adaround": ALL}),
    # its accurate bias correction gave chance below 8 bits (cause not found), so it runs at w8a8 alone
    "nncf": Tool(("nncf", "torchao"), {"default": ("w8a8", "w4a8", "w4a4"), "accurate": ("w8a8",)}),
    "torchao": Tool(("torchao",), {"default": ALL, "layers": ALL}),
    "quanto": Tool(("optimum-quanto",), {"default": ("w8a8", "w4a8"), "hqq": ("w4a8",)}),
    "onnxruntime": Tool(
        ("onnxruntime", "onnx", "onnxscript"), {"default": ("w8a8", "w4a8"), "entropy": ("w8a8", "w4a8")}
    ),
}  # fmt: skip


def material(network: str, seed: int, folder: Path) -> Path:
    """A file with the network, its calibration images and the test images."""
    import torch
    from safetensors.torch import save_file

    from planish.data import calibration_subset, load_data
    from planish.models import load_model

    path = folder / f"{network}-{seed}.safetensors"
    if not path.exists():
        loaded = load_model(network)
        data = load_data(None, loaded.preprocessing, seed=seed)
        subset = calibration_subset(data.train, data.train_labels, 512, seed)
        calibration = torch.stack([subset[i][0] for i in range(len(subset))])
        test = [data.test[i] for i in range(len(data.test))]
        tensors = {f"state.{name}": t.contiguous() for name, t in loaded.model.state_dict().items()}
        tensors |= {"calibration": calibration, "test": torch.stack([image for image, _ in test]),
                    "test_labels": torch.tensor([label for _, label in test])}  # fmt: skip
        save_file(tensors, path, {"recipe": json.dumps(loaded.recipe)})
    return path


def environment(name: str, folder: Path) -> Path:
    """The Python of a tool's environment; made if it is not there."""
    python = folder / name / "bin" / "python"
    if not (folder / name / "complete").exists():
        print(f"installing {name} ...", flush=True)
        venv.create(folder / name, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "-q", *TOOLS[name].requirements, "timm", "safetensors"]
        subprocess.run(command, check=True)
        (folder / name / "complete").touch()
    return python


def row(tool: str, method: str, network: str, scheme: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one run of a tool gives; a tool that fails leaves the last line of its complaint."""
    weights, activations = scheme[1:].split("a")
    folder = args.environments
    command = [str(environment(tool, folder)), str(HERE / f"run_{tool}.py"), "--material",
               str(material(network, seed, folder)), "--method", method, "--weights", weights, "--activations",
               activations, "--seed", str(seed), "--threads", str(args.threads)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    who = {"network": network, "tool": tool, "method": method, "scheme": scheme, "seed": seed, "threads": args.threads}
    if ended.returncode:
        return who | {"error": (ended.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return who | json.loads(ended.stdout.strip().splitlines()[-1])


def measure(args: argparse.Namespace, done: set[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    """The rows that are not there yet, the first seed of everything first."""
    for seed in args.seeds:
        for tool in args.tools:
            for network in args.networks:
                for method, schemes in TOOLS[tool].methods.items():
                    for scheme in schemes:
                        wanted = scheme in args.schemes and TOOLS[tool].only.get(method, network) == network
                        wanted &= not args.methods or method in args.methods
                        if wanted and (network, tool, method, scheme, str(seed)) not in done:
                            yield row(tool, method, network, scheme, seed, args)


def summary(path: Path, seeds: list[int]) -> str:
    """Top-1 in percent, mean and standard error over the seeds, with the seconds in the median."""
    top1: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    fp: dict[str, str] = {}
    with path.open() as file:
        for line in csv.DictReader(file):
            if line["error"] or int(line["seed"]) not in seeds:
                continue
            who = f"{line['tool']}, {line['method']}"
            top1[line["network"], who, line["scheme"]].append(100 * float(line["top1"]))
            seconds[line["network"], who].append(float(line["seconds"]))
            fp[line["network"]] = f"{100 * float(line['fp_top1']):.2f}"
    lines = []
    for network in fp:
        lines += scheme_table(
            f"{network}, float {fp[network]}", ALL, dict.fromkeys(w for n, w, _ in top1 if n == network),
            lambda who, scheme, network=network: top1.get((network, who, scheme), []),
            lambda who, network=network: seconds[network, who],
        )  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path("environments"))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--networks", nargs="+", default=["convnet", "vit"])
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--schemes", nargs="+", default=list(ALL))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--summary", action="store_true", help="only print the tables of what is measured")
    args = parser.parse_args()
    if args.summary:
        print(summary(args.out, args.seeds))
        return
    args.environments.mkdir(parents=True, exist_ok=True)
    continue_rows(
        args.out, FIELDS, lambda r: (r["network"], r["tool"], r["method"], r["scheme"], r["seed"]),
        lambda done: measure(args, done),
        ("tool", "method", "network", "scheme", "seed", "top1", "seconds", "error"),
    )  # fmt: skip
    print(summary(args.out, args.seeds))


if __name__ == "__main__":
    main()
