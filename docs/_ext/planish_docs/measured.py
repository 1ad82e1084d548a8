"""What was measured of a method: one function a benchmark, each giving Markdown with the protocol, or nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from planish_docs.tables import FLOAT, Figures, figures, grid, less, read, table

Rows = list[dict[str, str]]

NETWORKS = {"convnet": "convolutional network", "vit": "transformer"}
HARDER = {
    "cifar10-resnet20": "ResNet-20 on CIFAR-10 (JPEG)",
    "tin100-resnet20": "ResNet-20 on Tiny-ImageNet-100, 32 px",
    "cifar10-vit": "transformer on CIFAR-10 (JPEG)",
    "tin100-vit": "transformer on Tiny-ImageNet-100, 32 px",
}
TITLES = NETWORKS | HARDER
SAME_AS = {"best-qat": "fpq"}  # a name for another method with its default options
NOT_MEASURED = "Not measured: no benchmark of the repository has figures of it on test images."
GRIDS = (
    "weights per channel, activations per tensor, ranges by least squared error, first and last layer at 8 bits, "
    "one thread"
)
# the arms of the evidence study in which a law of noise, or an arm of `planish run`, takes part
STUDIED = {
    "given": ["given"],
    "tuned": ["tuned"],
    "averaged": ["averaged", "swa"],
    "sam": ["sam", "asam"],
    "flat": [
        "flat",
        "flat, not averaged",
        "flat, distilled",
        "flat, without labels",
        "flat, batch statistics",
        "flat, without labels, batch statistics",
        "clip only",
    ],
    "weight-differential": ["gaussian", "gaussian, naive"],
    "weight-differential-forward": ["gaussian, forward"],
    "weight-uniform": ["uniform"],
    "weight-residual": ["residual, weights", "flat"],
    "activation-gaussian": ["gaussian", "gaussian, naive"],
    "activation-uniform": ["uniform"],
    "activation-residual": ["residual, activations", "flat"],
}


def ptq(name: str, root: Path) -> str:
    """A quantization method beside calibrated rounding, from ``benchmarks/ptq.csv``."""
    rows = [row for row in read(root / "benchmarks/ptq.csv") if row["network"] in TITLES]
    measured = {network: _of(rows, network=network, arm=name) for network in TITLES}
    if not any(measured.values()):
        return NOT_MEASURED
    parts, harder = [], ""
    for network, mine in measured.items():
        if not mine:
            parts += [] if network in HARDER else [f"Not measured on the {NETWORKS[network]}."]
            continue
        if network in HARDER:
            harder = _harder("calibrated on images that it was trained on")
        rounded = _of(rows, network=network, arm="rtn")
        parts.append(_beside(network, {name: mine, "rtn": rounded}, "seconds"))
    shown = [row for network in NETWORKS for row in measured[network]]
    shown = shown or [row for mine in measured.values() for row in mine]
    learning = [row for row in shown if row["iterations"]]
    learned = f"{_all(learning, 'iterations')} iterations a unit where roundings are learned, " if learning else ""
    parts.append(
        f"Top-1 in percent on {_all(shown, 'test_images')} test images, mean and standard error over three seeds, that "
        f"draw the {_all(shown, 'calibration_images')} calibration images; differences are paired by seed. No labels; "
        f"{learned}{GRIDS}. Seconds are medians over schemes and seeds on a machine that was not alone: compare their "
        f"size, no more. Fashion-MNIST; `benchmarks/ptq.py`, {_file('ptq.csv')}.{harder}"
    )
    return "\n\n".join(parts)


def qat(name: str, root: Path) -> str:
    """A training method beside ``lsq``, and its variants, from ``benchmarks/qat.csv``."""
    rows = read(root / "benchmarks/qat.csv")
    name = SAME_AS.get(name, name)
    methods = [row for row in rows if row["suite"] == "methods" and row["start"] == "given" and not row["options"]]
    parts, harder = [], ""
    for network, title in TITLES.items():
        mine = _of(methods, network=network, arm=name)
        if not mine:
            parts += [] if network in HARDER else [f"Not measured on the {title}."]
            continue
        if network in HARDER:
            harder = _harder(_part(mine[0]))
        other = "rtn" if name == "lsq" else "lsq"
        parts.append(_beside(network, {name: mine, other: _of(methods, network=network, arm=other)}, "train_seconds"))
    if all(part.startswith("Not") for part in parts):
        return NOT_MEASURED
    parts += _variants(name, rows)
    one = next(row for row in methods if row["network"] in NETWORKS)
    parts.append(
        f"Top-1 in percent on {int(one['test_images']):,} test images, mean and standard error over three seeds, fewer "
        f"where it says so; differences are paired by seed. {one['epochs']} epochs over {int(one['train_images']):,} "
        f"images, batch {one['batch_size']}, start from the given network; {GRIDS}. Seconds are medians for the whole "
        f"training on a machine that was not alone. Fashion-MNIST; `benchmarks/qat.py`, {_file('qat.csv')}.{harder}"
    )
    return "\n\n".join(parts)


def _harder(used: str) -> str:
    """What is different on the networks of ``benchmarks/small_images.py``; ``used``: of their training images."""
    return (
        " CIFAR-10 and Tiny-ImageNet-100, ResNet-20 with a stem of stride 2, transformer with a convolutional stem: "
        f"{used}, all test images, the settings that were chosen on Fashion-MNIST."
    )


def _part(row: Mapping[str, str]) -> str:
    return f"{int(row['train_images']):,} of the 50,000 images that it was trained on"


def _variants(name: str, rows: Rows) -> list[str]:
    """The ablations of a method that were measured, with their differences from ``lsq``."""
    ablations = [row for row in rows if row["suite"] == "ablations" and row["network"] == "convnet"]
    arms = list(dict.fromkeys(row["arm"] for row in ablations if row["method"] == name and row["arm"] != "lsq"))
    if len(arms) < 2:
        return []
    reference = figures(_of(ablations, arm="lsq"))
    shown: list[tuple[str, Figures, str]] = []
    for arm in arms:
        mine = figures(_of(ablations, arm=arm))
        shown += [(arm, mine, ""), (f"{arm}, minus lsq", less(mine, reference), "")]
    signed = [f"{arm}, minus lsq" for arm in arms]
    return [table(f"variants, {NETWORKS['convnet']}", shown, signed=signed)]


def study(name: str, root: Path) -> str:
    """The arms of the evidence study in which a law of noise takes part, beside ``averaged``."""
    rows = read(root / "benchmarks/evidence/study.csv")
    arms = STUDIED.get(name, [])
    if not arms:
        return NOT_MEASURED
    parts, harder = [], ""
    for network, title in TITLES.items():
        here = [row for row in rows if row["model"] == network and row["method"] == "rtn"]
        names = [arm for arm in dict.fromkeys([*arms, "averaged"]) if _of(here, arm=arm)]
        if not set(names) & set(arms):
            continue
        if network in HARDER:
            harder = _harder(_part(here[0]))
        found = {arm: _with_float(_of(here, arm=arm)) for arm in names}
        shown = [(arm, found[arm], "") for arm in names]
        differences = [(f"{a} - averaged", less(found[a], found["averaged"]), "") for a in names if a != "averaged"]
        differences = [row for row in differences if row[1]]
        parts.append(table(title, [*shown, *differences], signed=[row[0] for row in differences]))
    one = next(row for row in rows if row["arm"] == "averaged")
    parts.append(
        f"Top-1 in percent on {int(one['test_images']):,} test images, mean and standard error over three seeds, fewer "
        f"where it says so; differences are paired by seed. {one['epochs']} epochs over {int(one['train_images']):,} "
        f"images (`given`: none), batch {one['batch_size']}, then calibrated rounding (`rtn`) with "
        f"{one['calibration_images']} calibration images; {GRIDS}. Arms that imitate a quantizer did so for w4a4, w3a3 "
        f"and w2a4, one of them a step. Fashion-MNIST; `benchmarks/evidence/study.py`, {_file('evidence/study.csv')}; "
        f"what the arms are is said in [When does flattening pay](/docs/evidence.md).{harder}"
    )
    return "\n\n".join(parts)


def compare(kind: str, network: str, names: Sequence[str], root: Path) -> str:
    """Several methods in one table, for a guide.

    Args:
        kind: ``ptq`` or ``qat``.
        network: ``convnet`` or ``vit``.
        names: of methods that were measured there.

    Raises:
        ValueError: one of them was not.
    """
    clock = "seconds" if kind == "ptq" else "train_seconds"
    rows = [row for row in read(root / f"benchmarks/{kind}.csv") if row["network"] == network]
    rows = [row for row in rows if kind == "ptq" or (row["suite"] == "methods" and row["start"] == "given")]
    found = {name: _of(rows, arm=name) for name in names}
    if missing := [name for name, mine in found.items() if not mine]:
        raise ValueError(f"benchmarks/{kind}.csv has nothing of {', '.join(missing)} on {network}")
    (fp,) = {row["fp_top1"] for mine in found.values() for row in mine}
    shown = [(name, figures(mine), _median(mine, clock)) for name, mine in found.items()]
    return table(f"{NETWORKS[network]} (float {100 * float(fp):.2f})", shown, "seconds")


def latency(network: str, root: Path) -> str:
    """Milliseconds and bytes of the exported files of one network."""
    rows = [row for row in read(root / "benchmarks/export_latency.csv") if row["network"] == network]
    cells = [
        (row["file"], row["ms"], f"{float(row['of_fp32']):.2f}x", f"{float(row['size_of_fp32']):.3f}x") for row in rows
    ]
    one = rows[0]
    return grid((f"{network}, batch {one['batch']}", "ms", "time of fp32", "size of fp32"), cells) + (
        f"\n\nONNX Runtime {one['onnxruntime']}, {one['threads']} thread, median of {one['repeats']}, random weights, "
        f"{one['processor']}; `benchmarks/export.py`, {_file('export_latency.csv')}."
    )


def _of(rows: Iterable[Mapping[str, str]], **wanted: str) -> Rows:
    return [dict(row) for row in rows if all(row[key] == value for key, value in wanted.items())]


def _with_float(rows: Rows) -> Figures:
    seeds = {row["seed"]: 100 * float(row["fp_top1"]) for row in rows}
    return {FLOAT: seeds, **figures(rows)}


def _beside(network: str, arms: Mapping[str, Rows], clock: str) -> str:
    """A table of the first arm, the second, and their difference."""
    first, *others = arms
    (fp,) = {row["fp_top1"] for rows in arms.values() for row in rows}
    found = {arm: figures(rows) for arm, rows in arms.items()}
    schemes = set(found[first])
    shown = [(arm, {s: v for s, v in found[arm].items() if s in schemes}, _median(arms[arm], clock)) for arm in arms]
    signed = []
    for other in others:
        if other != first:
            signed.append(f"{first} - {other}")
            shown.append((signed[-1], less(found[first], found[other]), ""))
    return table(f"{TITLES[network]} (float {100 * float(fp):.2f})", shown, "seconds", signed)


def _median(rows: Rows, clock: str) -> str:
    return f"{statistics.median(float(row[clock]) for row in rows):.0f}"


def _all(rows: Sequence[Mapping[str, str]], column: str) -> str:
    """The one value, or the least and the largest."""
    values = sorted({int(row[column]) for row in rows if row[column]})
    return " to ".join(f"{value:,}" for value in dict.fromkeys([values[0], values[-1]]))


def _file(name: str) -> str:
    return f"[{name}](/benchmarks/{name})"
