"""``planish evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.cli.options import Evaluate
from planish.data import calibration_subset, load_data, make_loader
from planish.deploy.checkpoint import load, read_head
from planish.errors import PlanishError
from planish.evaluation import evaluate, predict
from planish.models import EMBEDDED_MODELS, check_classes
from planish.recipes.check import check_models
from planish.recipes.material import load_for, watch_images
from planish.recipes.processes import make_console
from planish.recipes.session import free_cores, say
from planish.task import FEATURES, check_task, say_task, task_of

SHARES = ("top1", "flip_rate", "exact", "knn_top1")  # shown in percent
VOTERS = 10_000  # training images whose features vote, at most


def execute(command: Evaluate) -> None:
    """Measure a file, or --model with --weights, on the test images."""
    options = command.models
    check_models(options)
    if command.file and options.weights and (not command.against or Path(command.against).is_file()):
        raise PlanishError(
            f"give either the file {command.file} or --weights {options.weights}, not both (with --against MODEL, "
            "--weights are those of the network to compare with)"
        )
    if command.task:
        check_task(command.task)
    console = make_console()
    torch.set_num_threads(options.threads or free_cores())
    head = read_head(command.file) if command.file else None
    if command.file and head is not None:
        model, preprocessing, plan = load(command.file, trust=command.trust), head.preprocessing, head.assignment
        name, method = (str(head.protocol.get(key, "unknown")) for key in ("model", "method"))
        say(console, f"{command.file}: {name} in {f'{plan.scheme.name} by {method}' if plan else 'float'}")
    else:
        loaded = load_for(command.task, options.model, command.file or options.weights)
        model, name, preprocessing = loaded.model, "", loaded.preprocessing
        say(console, f"{command.file or options.weights or 'its own weights'}: {loaded.name} in float")
    say_task(model, command.task or None)
    data = load_data(options.data, preprocessing, seed=options.seed, progress=watch_images(console))
    for note in data.notes:
        say(console, f"note: {note}")
    check_classes(model, data)

    def loader(images: Any) -> Any:
        return make_loader(images, options.batch_size, shuffle=False, seed=0, workers=options.workers)

    tests, bank = loader(data.test), None
    reference, against = _reference(command, name, model, tests)
    if task_of(model) is FEATURES:
        count = min(VOTERS, len(data.train_labels))
        bank = loader(calibration_subset(data.train, data.train_labels, count, options.seed))
        say(console, f"{count} training images vote by their features")
    worth = evaluate(model, tests, reference=reference, bank=bank)
    for key, value in worth.items():
        note = f"  (against {against})" if key in ("flip_rate", "cosine", "error") else ""
        say(console, f"{key:10s} {_shown(key, value)}{note}")


def _reference(command: Evaluate, name: str, model: nn.Module, loader: Any) -> tuple[Tensor | None, str]:
    """The outputs of the network to compare with, and what it is."""
    task = task_of(model).name
    if command.against:
        path = Path(command.against)
        if path.is_file() and read_head(path) is not None:
            return predict(load(path, trust=command.trust), loader)[0], command.against
        return predict(load_for(task, command.against, command.models.weights).model, loader)[0], command.against
    if name in EMBEDDED_MODELS:  # any other network that a quantized one came from is not at hand
        return predict(load_for(task, name, None).model, loader)[0], f"{name} as it was given"
    return None, ""


def _shown(key: str, value: float) -> str:
    if key == "images":
        return f"{value:d}"
    if key == "seconds":
        return f"{value:.1f}"
    return f"{value:.2%}" if key in SHARES else f"{value:.4f}"
