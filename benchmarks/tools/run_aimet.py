"""AIMET, in the environment that it is installed in: AdaRound after ranges by its enhanced scheme (a search over the
signal-to-noise ratio), then the ranges of what layers take.

    pip install aimet-torch timm safetensors

A configuration of its own has the weights of layers quantized, symmetric, and nothing else; their inputs get quantizers
of their own, asymmetric. As delivered, AIMET would quantize what every operator gives. Biases, the sums of residual
blocks, and the products of attention stay in float. BatchNorm is folded first.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from aimet_torch.adaround import Adaround, AdaroundParameters
from aimet_torch.batch_norm_fold import fold_all_batch_norms
from aimet_torch.common.defs import QuantScheme
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.encoding_analyzer import SqnrEncodingAnalyzer
from aimet_torch.quantsim import QuantizationSimModel
from judge import Answer, Task, main
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tracing import traceable

ITERATIONS = 1000
BATCH = 32
RANGES = QuantScheme.post_training_tf_enhanced
LAYER = {"per_channel_quantization": "True", "params": {"weight": {"is_quantized": "True"}}}
CONFIG = {
    "defaults": {
        "ops": {}, "params": {"is_quantized": "False", "is_symmetric": "True"},
        "strict_symmetric": "False", "per_channel_quantization": "False",
    },
    "params": {},
    "op_type": dict.fromkeys(("Conv", "Gemm", "MatMul"), LAYER),
    "supergroups": [], "model_input": {}, "model_output": {},
}  # fmt: skip


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def simulated(model: nn.Module, task: Task, config: Path) -> Any:
    """The network with quantizers in, at the bits of the scheme."""
    sim = QuantizationSimModel(model, task.calibration[:1], quant_scheme=RANGES, config_file=str(config))
    for name, layer in layers(sim.model).items():
        layer.param_quantizers["weight"].bitwidth = 8 if name in task.edges else task.weights
        bits = 8 if name in task.edges else task.activations
        layer.input_quantizers[0] = QuantizeDequantize((), bits, False, encoding_analyzer=SqnrEncodingAnalyzer(()))
    return sim


def rounded(model: nn.Module, task: Task, folder: Path) -> nn.Module:
    """AdaRound; the grids of the weights are left in a file of the folder."""
    bits = [(layer, task.weights) for name, layer in layers(model).items() if name not in task.edges]
    images = DataLoader(TensorDataset(task.calibration), batch_size=BATCH, shuffle=True)
    settings = AdaroundParameters(images, len(images), ITERATIONS, forward_fn=lambda net, batch: net(batch[0]))
    return Adaround.apply_adaround(
        model, task.calibration[:1], settings, str(folder), "weights", default_param_bw=8, param_bw_override_list=bits,
        default_quant_scheme=RANGES, default_config_file=str(folder / "config.json"),
    )  # fmt: skip


def adaround(task: Task) -> Answer:
    """AdaRound for 1,000 iterations a layer."""
    model = traceable(task.model)
    QuantizationMixin.ignore_unknown_modules()  # such as timm's LayerNorm, which stay in float
    fold_all_batch_norms(model, task.calibration.shape[1:], dummy_input=task.calibration[:1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        model = rounded(model, task, folder)
        sim = simulated(model, task, folder / "config.json")
        sim.set_and_freeze_param_encodings(str(folder / "weights.encodings"))
    with torch.no_grad():
        sim.compute_encodings(lambda net: [net(batch) for batch in task.batches])
    return sim.model.eval()


METHODS = {"adaround": adaround}

if __name__ == "__main__":
    main(METHODS, ("aimet-torch",))
