"""torchao: PT2E static quantization (`prepare_pt2e`, calibration, `convert_pt2e`) with the `X86InductorQuantizer`.

Its recipe is int8: signed weights, scale from their range; unsigned inputs, range from a histogram. Fewer bits are the
same recipe with other `quant_min` and `quant_max` in its `QuantizationSpec`, run as the reference graph of PT2E: what
comes out is exact for these bits, though no kernel of the tool uses it. Left in float: the products of attention, and
in the method `layers` everything that is no layer. `default` is the quantizer's global recipe, which also quantizes
residual addends and what pooling reads, all at the bits of the layer nearby.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import torch
from judge import Answer, Task, main
from torch import nn
from torchao.quantization.pt2e import HistogramObserver, move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationConfig
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)


def recipe(weights: int, activations: int) -> QuantizationConfig:
    """The quantizer's own configuration with the levels of these bits."""
    config = get_default_x86_inductor_quantization_config()
    inputs = replace(config.input_activation, quant_max=2**activations - 1)
    found = replace(config.weight, quant_min=-(2 ** (weights - 1)), quant_max=2 ** (weights - 1) - 1)
    return replace(config, input_activation=inputs, output_activation=inputs, weight=found)


def quantizer(everything: bool, task: Task) -> X86InductorQuantizer:
    """The global recipe, or one by name for each layer, which leaves all else in float."""
    inner, outer, made = recipe(task.weights, task.activations), recipe(8, 8), X86InductorQuantizer()
    for name, module in task.model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and (name in task.edges or not everything):
            made.set_module_name_qconfig(name, outer if name in task.edges else inner)
    return made.set_global(inner) if everything else made


def run(everything: bool, task: Task) -> Answer:
    """Export, observe the calibration images, convert."""
    sizes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    exported = torch.export.export(task.model, (task.calibration[:2],), dynamic_shapes=sizes).module()
    prepared = prepare_pt2e(exported, quantizer(everything, task))
    for module in prepared.modules():
        if isinstance(module, HistogramObserver):
            # it would search a range for the 256 levels of its dtype, whatever levels it is told to use
            module.dst_nbins = 2 ** math.ceil(math.log2(module.quant_max - module.quant_min + 1))
    with torch.no_grad():
        for batch in task.batches:
            prepared(batch)
    return move_exported_model_to_eval(convert_pt2e(prepared))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main({"default": partial(run, True), "layers": partial(run, False)}, ("torchao",))
