"""ONNX Runtime: `quantize_static` of the exported network, QDQ, run by its CPU provider.

Weights have 8 or 4 bits, activations 8: w8a8 and w4a8 are offered, and no other scheme here. `default` is that of the
tool but for scales per channel: ranges by the smallest and the largest value, and every operator quantized that it can,
the residual additions, normalizations and products of attention among them. `entropy` takes ranges by entropy and
quantizes inputs and weights of layers alone, which leaves all else in float.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from judge import Answer, Task, main
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

LAYERS = ["Conv", "Gemm", "MatMul"]


class Reader(CalibrationDataReader):
    """The batches, one after the other."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.left = iter([{"images": batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Convolutions and products with a weight, in order."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in constant]


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def settings(path: Path, only_layers: bool, task: Task) -> dict[str, object]:
    """What `quantize_static` is told of this network."""
    model = onnx.load(path)
    nodes = layers(model)
    eight = [{"quant_type": QuantType.QInt8, "axis": 0 if nodes[0].op_type == "Conv" else 1}]
    last = [{"quant_type": QuantType.QInt8, "axis": 0 if _transposed(nodes[-1]) else 1}]
    extra: dict[str, object] = {}
    if task.weights == 4:
        extra["TensorQuantOverrides"] = {nodes[0].input[1]: eight, nodes[-1].input[1]: last}
    if not only_layers:
        return {"extra_options": extra}
    names = {node.name for node in nodes}
    others = [node.name for node in model.graph.node if node.op_type in LAYERS and node.name not in names]
    extra["OpTypesToExcludeOutputQuantization"] = LAYERS
    return {"extra_options": extra, "op_types_to_quantize": LAYERS, "nodes_to_exclude": others}


def _transposed(node: onnx.NodeProto) -> bool:
    return any(found.name == "transB" and found.i for found in node.attribute)


def run(calibration: CalibrationMethod, only_layers: bool, task: Task) -> Answer:
    """Export, fold, calibrate, quantize, load."""
    if task.activations != 8 or task.weights not in (8, 4):
        raise SystemExit("ONNX Runtime's quantize_static has weights of 8 or 4 bits with activations of 8")
    with tempfile.TemporaryDirectory() as folder:
        raw, ready, done = (Path(folder) / f"{name}.onnx" for name in ("raw", "ready", "done"))
        sizes = {"x": {0: torch.export.Dim("batch", min=1, max=1024)}}
        torch.onnx.export(task.model, (task.calibration[:2],), raw, input_names=["images"], opset_version=21,
                          dynamo=True, dynamic_shapes=sizes, external_data=False, verbose=False)  # fmt: skip
        quant_pre_process(raw, ready, skip_symbolic_shape=True)
        quantize_static(ready, done, Reader(task.batches), per_channel=True, calibrate_method=calibration,
                        weight_type=QuantType.QInt4 if task.weights == 4 else QuantType.QInt8,
                        **settings(ready, only_layers, task))  # fmt: skip
        loaded = session(done)
    return lambda images: torch.from_numpy(loaded.run(None, {"images": images.numpy()})[0])


if __name__ == "__main__":
    methods = {"default": (CalibrationMethod.MinMax, False), "entropy": (CalibrationMethod.Entropy, True)}
    main({name: partial(run, *how) for name, how in methods.items()}, ("onnxruntime",))
