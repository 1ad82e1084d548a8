"""A quantized model as an ONNX graph in which every quantizer is one node.

``torch.onnx.export`` would spell a quantizer out as a division, a rounding and so on. With the operator of
``operators.py`` it becomes a node ``planish::FakeQuantize``, which ``lower.py`` turns into what a runtime understands.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from planish.deploy.card import INPUT, OUTPUT
from planish.deploy.onnx.quiet import quiet
from planish.deploy.operators import fake_quantize, visible_quantizers
from planish.errors import PlanishError
from planish.network.batches import logits_of
from planish.network.modes import evaluating

DOMAIN, NODE = "planish", "FakeQuantize"
OPSET = 21  # the first with 4-bit tensors


class _Network(nn.Module):
    """The model with one named argument: a tapped forward takes any, which an exporter cannot name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.net(images))


def _translation() -> dict[Any, Any]:
    """How the exporter writes ``planish::fake_quantize``."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    ints = ("qmin", "qmax", "axis", "group_size")
    attributes = [schema.Attribute(name, schema.AttrType.INT, "") for name in ints]
    attributes += [schema.Attribute(name, schema.AttrType.STRING, "") for name in ("granularity", "site")]
    attributes.append(schema.Attribute("offset", schema.AttrType.FLOAT, ""))
    node = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        NODE,
        schema(
            NODE, DOMAIN, 1,
            inputs=[schema.FormalParameter(name, "T") for name in ("x", "scale", "zero_point")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=attributes,
        ),
    )  # fmt: skip

    def translate(
        x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, offset: float,
        granularity: str, axis: int, group_size: int, site: str,
    ) -> Any:  # fmt: skip
        return node(
            x, scale, zero_point, qmin=qmin, qmax=qmax, offset=offset,
            granularity=granularity, axis=axis, group_size=group_size, site=site,
        )  # fmt: skip

    return {torch.ops.planish.fake_quantize.default: translate}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs."""
    loggers = quiet("torch.onnx", "onnxscript", "torch.export")
    with loggers, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def network_graph(model: nn.Module, example: Tensor) -> Any:
    """The graph of ``model`` (an ``onnx_ir.Model``) with one ``planish::FakeQuantize`` node for each quantizer.

    Args:
        model: a model from planish, or any float model.
        example: images (batch, channels, height, width) of the size that the file shall take; the batch stays free.

    Raises:
        PlanishError: the model cannot be exported; the sentence has the exporter's reason.
    """
    assert fake_quantize is not None  # its registration is what the translation below needs
    batch = torch.export.Dim("batch", min=1)
    # a batch of one would be taken for a constant
    example = example if len(example) > 1 else torch.cat([example, example])
    try:
        with _quiet(), evaluating(model), visible_quantizers(model), torch.no_grad():
            program = torch.onnx.export(
                _Network(model).eval(), (example,), dynamo=True, opset_version=OPSET, verbose=False, optimize=True,
                dynamic_shapes={"images": {0: batch}}, custom_translation_table=_translation(),
                input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
    except Exception as error:  # each stage of the exporter raises its own kind
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line for line in str(cause).splitlines() if line.strip()]
        raise PlanishError(
            f"{type(model).__name__} cannot be exported to ONNX: {lines[0] if lines else type(cause).__name__}"
        ) from error
    assert program is not None
    return program.model
