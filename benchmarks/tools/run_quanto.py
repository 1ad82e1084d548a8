"""optimum-quanto: `quantize`, one `Calibration` pass, `freeze`.

Weights have 8, 4 or 2 bits, activations 8: w8a8 and w4a8 are offered, and no other scheme here. Left in float: the
inputs of all convolutions (quanto quantizes what a convolution gives out, and its calibration takes that away where a
float operation follows, here always), the residual additions and the products of attention. Below 8 bits quanto would
give a scale to each group of 128 weights; here it is one for each output channel, as everywhere else.
"""

from __future__ import annotations

from functools import partial

import torch
from judge import Answer, Task, main
from optimum.quanto import Calibration, HqqOptimizer, Optimizer, freeze, qint8, qtypes, quantize
from optimum.quanto.nn import QModuleMixin


def run(optimizer: type[Optimizer] | None, task: Task) -> Answer:
    """The weights' scales from their range or, given an optimizer, from what it finds; it has none for 8 bits."""
    if task.activations != 8 or task.weights not in (8, 4, 2):
        raise SystemExit("optimum-quanto has weights of 8, 4 or 2 bits with activations of 8")
    model, edges = task.model, list(task.edges)
    quantize(model, weights=qint8, activations=qint8, include=edges)
    found = optimizer() if optimizer and task.weights < 8 else None
    quantize(model, weights=qtypes[f"qint{task.weights}"], activations=qint8, optimizer=found, exclude=edges)
    for module in model.modules():
        if isinstance(module, QModuleMixin):
            module.weight_group_size = None
    with torch.no_grad(), Calibration():
        for batch in task.batches:
            model(batch)
    freeze(model)
    return model


if __name__ == "__main__":
    # compiles its extension, once for each environment; not a part of quantizing
    torch.ops.quanto.unpack(torch.zeros(4, dtype=torch.uint8), 4)
    main({"default": partial(run, None), "hqq": partial(run, HqqOptimizer)}, ("optimum-quanto",))
