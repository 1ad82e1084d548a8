"""Sony's Model Compression Toolkit, in the environment that it is installed in: gradient-based quantization after
training (``pytorch_gradient_post_training_quantization``).

    pip install model_compression_toolkit timm safetensors

The toolkit quantizes what operators give, not what layers take. So that it follows the rule of the others (a scale for
each layer's input, sums of residual blocks in float), every layer gets an operator before it that changes nothing, and
the description of the target has these alone quantized, asymmetric, and the weights, symmetric. Biases and the products
of attention stay in float.
"""

from __future__ import annotations

from collections.abc import Iterator

import model_compression_toolkit as mct
from judge import Answer, Task, main
from mct_quantizers import QuantizationMethod
from model_compression_toolkit.core.common.network_editors import NodeNameFilter
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR, WEIGHTS_N_BITS
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema
from torch import Tensor, nn
from tracing import traceable

EPOCHS = 40
BATCH = 32
HESSIAN_BATCH = 128


def described(weights: int, activations: int) -> schema.TargetPlatformCapabilities:
    """A target whose layers have weights, and whose layers' inputs have activations, of these bits or 8."""
    off = schema.AttributeQuantizationConfig(enable_weights_quantization=False)
    kernel = schema.AttributeQuantizationConfig(
        weights_quantization_method=QuantizationMethod.SYMMETRIC, weights_n_bits=weights,
        weights_per_channel_threshold=True, enable_weights_quantization=True,
    )  # fmt: skip
    floats = schema.OpQuantizationConfig(
        default_weight_attr_config=off, attr_weights_configs_mapping={}, activation_n_bits=8,
        activation_quantization_method=QuantizationMethod.UNIFORM, supported_input_activation_n_bits=(activations, 8),
        enable_activation_quantization=False, quantization_preserving=False, signedness=schema.Signedness.AUTO,
    )  # fmt: skip
    layer = floats.clone_and_edit(attr_weights_configs_mapping={KERNEL_ATTR: kernel, BIAS_ATTR: off})
    taken = floats.clone_and_edit(enable_activation_quantization=True, activation_n_bits=activations)
    layers = choice(layer, layer.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: 8}}), weights)
    inputs = choice(taken, taken.clone_and_edit(activation_n_bits=8), activations)
    names = schema.OperatorSetNames
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(floats,)),
        operator_set=(
            schema.OperatorsSet(name=names.CONV, qc_options=layers),
            schema.OperatorsSet(name=names.FULLY_CONNECTED, qc_options=layers),
            schema.OperatorsSet(name=names.LEAKY_RELU, qc_options=inputs),
        ),
    )


def choice(
    low: schema.OpQuantizationConfig, eight: schema.OpQuantizationConfig, bits: int
) -> schema.QuantizationConfigOptions:
    """The bits of the scheme, unless 8 are chosen by hand."""
    configurations = (low,) if bits == 8 else (low, eight)
    return schema.QuantizationConfigOptions(quantization_configurations=configurations, base_config=low)


class OfImages(nn.Module):
    """A network of images alone: every other argument that it could be given would become an input of the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def with_inputs(task: Task) -> nn.Module:
    """The network with an operator before every layer that gives what it takes: a leaky ReLU of slope one."""
    model = traceable(task.model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            model.set_submodule(name, nn.Sequential(nn.LeakyReLU(1.0), layer))
    return OfImages(model)


def eight_at_edges(task: Task) -> mct.core.BitWidthConfig:
    """Eight bits for the first and the last layer, found by the names of their nodes."""
    config = mct.core.BitWidthConfig()
    for edge in task.edges:
        name = "net_" + edge.replace(".", "_")
        folded = NodeNameFilter(f"{name}_1") | NodeNameFilter(f"{name}_1_bn")
        config.set_manual_weights_bit_width(folded, 8, "weight")
        config.set_manual_activation_bit_width(NodeNameFilter(f"{name}_0"), 8)
    return config


def gptq(task: Task) -> Answer:
    """The default settings, for 40 epochs."""

    def batches() -> Iterator[list[Tensor]]:
        for images in task.calibration.split(BATCH):
            yield [images]

    core = mct.core.CoreConfig(bit_width_config=eight_at_edges(task))
    settings = mct.gptq.get_pytorch_gptq_config(EPOCHS, hessian_batch_size=HESSIAN_BATCH)
    model, _ = mct.gptq.pytorch_gradient_post_training_quantization(
        with_inputs(task), batches, core_config=core, gptq_config=settings,
        target_platform_capabilities=described(task.weights, task.activations),
    )  # fmt: skip
    return model.eval()


METHODS = {"gptq": gptq}

if __name__ == "__main__":
    main(METHODS, ("model_compression_toolkit",))
