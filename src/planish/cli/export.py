"""``planish export``."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from planish.cli.files import check_target
from planish.cli.options import Export
from planish.data import ImageData, calibration_subset, load_data, make_loader
from planish.deploy.card import FLOAT
from planish.deploy.checkpoint import load, read_head
from planish.deploy.onnx.export import Exported, export
from planish.deploy.onnx.runtime import milliseconds, quantize_static
from planish.errors import PlanishError
from planish.models import Preprocessing, check_classes, classes_of, load_model
from planish.network import detach
from planish.recipes.material import watch_images
from planish.recipes.processes import make_console
from planish.recipes.session import free_cores, say

BATCH = 100
BATCHES = (1, 16)  # timed


def execute(command: Export) -> None:
    """Write the file, say what became of every layer, and time it beside the float file and ONNX Runtime's own."""
    if command.images < 1 or command.calibration_images < 1 or command.threads < 1:
        raise PlanishError("--images, --calibration-images and --threads: give 1 or more")
    check_target(command.out, command.overwrite)
    console = make_console()
    torch.set_num_threads(free_cores())
    model, looks, classes = _network(command)
    data = load_data(command.data, looks, seed=command.seed, progress=watch_images(console))
    for note in data.notes:
        say(console, f"note: {note}")
    check_classes(model, data)
    calibration = _calibration(data, command)
    tests = Subset(data.test, range(min(command.images, len(data.test))))  # type: ignore[arg-type]
    done = export(
        model, command.out, images=make_loader(tests, BATCH, shuffle=False, seed=0), layout=command.layout,
        output_bits=command.output_bits, constants=command.constants, calibration=calibration,
        classes=classes or classes_of(model, data),
    )  # fmt: skip
    for line in [*weight_lines(done), "", str(done)]:
        console.print(line, markup=False, highlight=False, no_wrap=True, crop=False, overflow="ignore")
    if command.timing:
        _time(command, console, model, done, calibration, looks.input_size)


def _network(command: Export) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    """The network of a file, or the one in float that is named; what its images go through; its classes if known."""
    if not command.file.is_file():
        if command.file.suffix == ".safetensors":
            raise PlanishError(f"the file {command.file} is not there")
        loaded = load_model(str(command.file), weights=command.weights, trust=command.trust)
        return loaded.model, loaded.preprocessing, None
    if command.weights is not None:
        raise PlanishError(f"{command.file} is a file: --weights is for a network that is named")
    head = read_head(command.file)
    if head is None:
        raise PlanishError(
            f"{command.file} holds plain weights and not what builds their network: "
            f"name the network, and give the file as --weights"
        )
    return load(command.file, trust=command.trust), head.preprocessing, head.classes


def _calibration(data: ImageData, command: Export) -> Any:
    count = min(command.calibration_images, len(data.train_labels))
    subset = calibration_subset(data.train, data.train_labels, count, command.seed)
    return make_loader(subset, BATCH, shuffle=False, seed=0)


def weight_lines(done: Exported) -> list[str]:
    """A line for each weight: its bytes in the file and its compression, and the kernel of its product."""
    forms = {form.name: form.kernel for form in done.forms}
    width = max((len(site) for site in done.weights), default=0)
    lines = []
    for site, (stored, floats) in done.weights.items():
        owner = site.rpartition(".")[0]
        kernel = forms.get(owner, forms.get(site, ""))
        lines.append(
            f"{site:{width}s}  {stored:>10,} bytes  {floats / max(1, stored):5.1f}x smaller  {kernel}".rstrip()
        )
    return lines


def _time(command: Export, console: Any, model: nn.Module, done: Exported, calibration: Any, shape: Any) -> None:
    """Beside the same network in float and ONNX Runtime's ``quantize_static`` of that."""
    with tempfile.TemporaryDirectory() as folder:
        floats, theirs = done.path, Path(folder) / "int8.onnx"
        if done.scheme != FLOAT:
            floats = Path(folder) / "float.onnx"
            bare = copy.deepcopy(model)
            detach(bare)
            bare.planish_assignment = None  # type: ignore[assignment]
            export(bare, floats)
        files = {"float32": floats, "onnxruntime int8": theirs}
        if done.scheme != FLOAT:
            files[f"planish {done.scheme}"] = done.path
        try:
            quantize_static(floats, theirs, calibration)
        except Exception as error:  # its own errors are many; the file itself is written and checked
            say(console, f"note: ONNX Runtime's own quantization failed: {str(error).splitlines()[0]}")
            del files["onnxruntime int8"]
        taken = {batch: milliseconds(files, shape, batch, threads=command.threads) for batch in BATCHES}
        say(console, f"{command.threads} thread(s), median of 20, in turns; ms at batch {BATCHES[0]} and {BATCHES[1]}:")
        for name, path in files.items():
            times = "  ".join(
                f"{taken[b][name]:9.3f} ms ({taken[b][name] / taken[b]['float32']:.2f}x)" for b in BATCHES
            )
            share = path.stat().st_size / floats.stat().st_size
            say(console, f"{name:18s} {path.stat().st_size / 1e6:9.3f} MB ({share:.3f}x)  {times}")
