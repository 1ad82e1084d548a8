"""``planish evaluate``."""

from __future__ import annotations

import torch
from torch import Tensor

from planish.cli.options import Evaluate
from planish.data import load_data, make_loader
from planish.errors import PlanishError
from planish.evaluation import evaluate, predict
from planish.models import EMBEDDED_MODELS, check_classes, load_model
from planish.ptq.files import load_quantized
from planish.recipes.check import check_models
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
    quantized = load_quantized(command.file, trust=command.trust) if command.file else None
    if quantized is not None:
        model, head = quantized
        name, preprocessing = str(head["protocol"].get("model", "")), head["preprocessing"]
        say(
            console,
            f"{command.file}: {name} in {head['scheme']['name']} by {head['protocol'].get('method', 'unknown')}",
        )
    else:
        loaded = load_model(options.model, weights=command.file or options.weights, trust=True)
        model, name, preprocessing = loaded.model, "", loaded.preprocessing
        say(console, f"{command.file or options.weights or 'its own weights'}: {loaded.name} in float")
    data = load_data(options.data, preprocessing, seed=options.seed)
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
