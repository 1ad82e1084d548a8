"""``planish evaluate``."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.cli.options import Evaluate
from planish.data import load_data, make_loader
from planish.deploy.checkpoint import load, read_head
from planish.errors import PlanishError
from planish.evaluation import evaluate, predict
from planish.models import EMBEDDED_MODELS, check_classes, load_model
from planish.recipes.check import check_models
from planish.recipes.material import watch_images
from planish.recipes.processes import make_console
from planish.recipes.session import free_cores, say

FORMATS = {
    "top1": "{:.2%}",
    "nll": "{:.4f}",
    "ece": "{:.4f}",
    "flip_rate": "{:.2%}",
    "images": "{:d}",
    "seconds": "{:.1f}",
}


def execute(command: Evaluate) -> None:
    """Measure a file, or --model with --weights, on the test images."""
    options = command.models
    check_models(options)
    if command.file and options.weights:
        raise PlanishError(f"give either the file {command.file} or --weights {options.weights}, not both")
    console = make_console()
    torch.set_num_threads(options.threads or free_cores())
    head = read_head(command.file) if command.file else None
    if command.file and head is not None:
        model, preprocessing, plan = load(command.file, trust=command.trust), head.preprocessing, head.assignment
        name, method = (str(head.protocol.get(key, "unknown")) for key in ("model", "method"))
        say(console, f"{command.file}: {name} in {f'{plan.scheme.name} by {method}' if plan else 'float'}")
    else:
        loaded = load_model(options.model, weights=command.file or options.weights, trust=True)
        model, name, preprocessing = loaded.model, "", loaded.preprocessing
        say(console, f"{command.file or options.weights or 'its own weights'}: {loaded.name} in float")
    data = load_data(options.data, preprocessing, seed=options.seed, progress=watch_images(console))
    for note in data.notes:
        say(console, f"note: {note}")
    check_classes(model, data)
    loader = make_loader(data.test, options.batch_size, shuffle=False, seed=0, workers=options.workers)
    reference: Tensor | None = None
    if name in EMBEDDED_MODELS:  # any other network that a quantized one came from is not at hand
        reference = predict(load_model(name).model, loader)[0]
    worth = evaluate(model, loader, reference=reference)
    for key, value in worth.items():
        note = f"  (against {name} as it was given)" if key == "flip_rate" else ""
        say(console, f"{key:10s} {FORMATS[key].format(value)}{note}")
