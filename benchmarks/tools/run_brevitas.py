"""Brevitas, in the environment that it is installed in, as its ImageNet example quantizes after training.

    pip install brevitas accelerate timm safetensors

Only layers are quantized: their weights, symmetric, and their inputs, asymmetric; both ranges are searched for the
least squared error. Biases, the sums of residual blocks, and the products of attention stay in float. Biases are
corrected last. What the example takes from the shape of ImageNet's networks, the first and the last layer, is given by
name here.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize
from brevitas_examples.imagenet_classification.ptq import learned_round_utils as rounding
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_act_equalization,
    apply_bias_correction,
    apply_gpfq,
    apply_gptq,
    calibrate,
    create_quant_maps,
)
from judge import Answer, Task, main
from torch import Tensor, nn
from tracing import traceable

Loader = list[tuple[Tensor, Tensor]]


def loader(task: Task) -> Loader:
    """The calibration images; the labels are asked for and never read."""
    return [(images, torch.zeros(len(images))) for images in task.batches]


def layer_map(weights: int, activations: int) -> dict[type[nn.Module], Any]:
    """How a layer of each kind is replaced, in the example's ``layerwise`` backend."""
    maps = create_quant_maps(
        dtype=torch.float32, bias_bit_width=None, weight_bit_width=weights, act_bit_width=activations,
        weight_param_method="mse", act_param_method="mse", weight_scale_type="float_scale",
        act_scale_type="float_scale", weight_quant_type="sym", act_quant_type="asym",
        weight_quant_granularity="per_channel", act_quant_granularity="per_tensor",
        act_scale_computation_type="static", weight_narrow_range=False, weight_quant_format="int",
        act_quant_format="int", act_quant_percentile=99.999,
    )  # fmt: skip
    found: dict[type[nn.Module], Any] = maps[1]
    return found


def prepared(model: nn.Module, task: Task) -> nn.Module:
    """The network with quantizers in, and its ranges set."""
    model = layerwise_quantize(model, layer_map(task.weights, task.activations), name_blacklist=list(task.edges))
    model = layerwise_quantize(model, layer_map(8, 8)).eval()
    with torch.no_grad():
        model(task.batches[0])  # sets the scales of the weights
    calibrate(loader(task), model)
    return model


def ready(task: Task, equalize: int) -> nn.Module:
    """The float network as the example prepares it. In a CNN, BatchNorm is folded and pairs of layers are equalized in
    so many rounds. In a transformer, which the example's tracer does not take, the inputs of layers are equalized
    against their weights."""
    if is_transformer(task.model):
        model = copy.deepcopy(task.model)
        apply_act_equalization(model, loader(task), layerwise=True)
        return model
    return preprocess_for_quantize(traceable(task.model), equalize_iters=equalize)


def is_transformer(model: nn.Module) -> bool:
    return hasattr(model, "blocks")


def gptq(task: Task) -> Answer:
    """GPTQ with its default settings; without pairs of layers equalized, which did it harm (w3a3, one seed)."""
    model = prepared(ready(task, equalize=0), task)
    apply_gptq(loader(task), model, create_weight_orig=True)
    apply_bias_correction(loader(task), model)
    return model.eval()


def gpfq(task: Task) -> Answer:
    """GPFQ with its default settings, which sees the quantized inputs of a layer beside the float ones."""
    model = prepared(ready(task, equalize=20), task)
    apply_gpfq(loader(task), model, act_order=False)
    apply_bias_correction(loader(task), model)
    return model.eval()


def learned_round(task: Task) -> Answer:
    """Roundings learned block by block for 1,000 iterations: the stages of a ResNet, as in the example, which prepares
    nothing before; the blocks of a transformer."""
    model = prepared(copy.deepcopy(task.model), task)
    options = argparse.Namespace(
        learned_round="hard_sigmoid", learned_round_mode="blockwise", learned_round_loss="mse",
        learned_round_lr=1e-2, learned_round_iters=1000, learned_round_batch_size=32, learned_round_lr_scheduler=None,
    )  # fmt: skip
    blocks = r"^\d+$" if is_transformer(task.model) else r"layer\d+"
    without_amp(lambda: rounding.apply_learned_round(model, loader(task), options, blocks))
    apply_bias_correction(loader(task), model)
    return model.eval()


def without_amp(call: Callable[[], None]) -> None:
    """Half precision is meant for a GPU; on a CPU it would only be slower."""
    given = rounding.parse_args_to_dataclass

    def plain(options: argparse.Namespace) -> Any:
        config = given(options)
        config.training_args.use_amp = False
        return config

    rounding.parse_args_to_dataclass = plain
    try:
        call()
    finally:
        rounding.parse_args_to_dataclass = given


METHODS = {"gptq": gptq, "gpfq": gpfq, "learned-round": learned_round}

if __name__ == "__main__":
    main(METHODS, ("brevitas",))
