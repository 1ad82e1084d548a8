"""``planish.export``: a model as an ONNX file with small weights and integer kernels, checked against the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planish import __version__
from planish.deploy.card import Card
from planish.deploy.onnx.runtime import (
    FLOAT,
    INTEGER,
    Agreement,
    Executed,
    compare,
    executed,
    open_session,
    some_images,
)
from planish.deploy.origin import find_classes, find_preprocessing
from planish.errors import PlanishError
from planish.models import Preprocessing
from planish.models.weights import write_whole
from planish.network.batches import split_batch
from planish.network.half import check_constants, round_constants
from planish.task import CLASSES, FEATURES, LABELS, task_of

LAYOUTS = ("small", "fast")


@dataclass(frozen=True)
class Exported:
    """What was written, and what became of every product.

    Attributes:
        bytes: of the file. weights: bytes of each quantized weight in the file, and of the same in float32.
        forms: of each matrix product of quantized operands: name, kernel, and why where it is no integer kernel.
        kernels: how often each kernel stands in the graph that ONNX Runtime executes.
        agreement: with the PyTorch model.
        output_grids: how many tensors got a grid of ``output_bits``.
        halved: how many tensors were rounded to half precision.
    """

    path: Path
    scheme: str
    layout: str
    bytes: int
    weights: Mapping[str, tuple[int, int]]
    forms: tuple[Any, ...]
    kernels: Mapping[str, int]
    agreement: Agreement
    output_grids: int = 0
    halved: int = 0

    @property
    def in_float(self) -> list[Any]:
        """The products of quantized operands that no integer kernel computes."""
        return [form for form in self.forms if form.why]

    def __str__(self) -> str:
        integer = {name: count for name, count in self.kernels.items() if name in INTEGER}
        floats = {name: count for name, count in self.kernels.items() if name in FLOAT}
        agreement = self.agreement
        lines = [
            f"{self.path}: {self.scheme}, {self.bytes / 1e6:.3f} MB, layout {self.layout}",
            f"integer kernels: {_counted(integer)}; float products: {_counted(floats)}",
            *(f"in float: {form.name}: {form.why}" for form in self.in_float),
        ]
        if inexact := sum(form.inexact_channels for form in self.forms):
            lines.append(
                f"{inexact} channels of convolutions may round to the next code where a sum lies near a border"
            )
        if self.output_grids:
            lines.append(
                f"{self.output_grids} outputs of convolutions and sums have a grid of 8 bits, which the model has not"
            )
        if self.halved:
            lines.append(
                f"{self.halved} tensors beside the codes were rounded to half precision, which the model's are not"
            )
        lines.append(
            f"same {agreement.same} as the PyTorch model on {agreement.images - len(agreement.differing)} of "
            f"{agreement.images} {agreement.what}; largest difference of a logit {agreement.largest:.2g}"
        )
        lines += [f"differs: image {index}, margin {margin:.4f}" for index, margin in agreement.differing]
        return "\n".join(lines)


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())) or "none"


def export(
    model: nn.Module,
    path: Path | str,
    *,
    images: Iterable[Any] | None = None,
    layout: str = "small",
    output_bits: int | None = None,
    constants: str = "float",
    calibration: Iterable[Any] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model as an ONNX file for stock ONNX Runtime, and compare it with the model.

    The quantized products run on integer kernels with the model's own semantics. What is not given is taken from the
    model, as :func:`planish.save` does. A model in float becomes a float file.

    Args:
        model: what :func:`planish.quantize`, ``train`` or ``load`` gave back.
        path: the file; it holds the old or the new content, never a part.
        images: batches to compare on, tensors or (tensor, label). Default: eight random images.
        layout: ``"small"`` stores weights at 2 or 4 bits (3 bits in 4), which the runtime widens when it loads the
            file; ``"fast"`` as bytes, which load sooner.
        output_bits: 8 gives the outputs of convolutions that would stay in float a grid of 8 bits, set on
            ``calibration``: faster, and a small change of the network.
        constants: ``"half"`` stores biases, norms, embeddings and scales in half precision. A model whose constants
            are of half precision already (:class:`planish.ptq.HalveConstants`) stays as it is; those of another one are
            rounded, which changes the network.

    Returns:
        A report; ``print`` it.

    Raises:
        PlanishError: an option is not known, packages are missing, or the model cannot be exported.
    """
    if layout not in LAYOUTS:
        raise PlanishError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
    check_constants(constants)
    if output_bits not in (None, 8):
        raise PlanishError(f"output_bits is {output_bits!r}: give 8, or None to keep these outputs in float")
    if output_bits and calibration is None:
        raise PlanishError("output_bits needs calibration: batches of images on which the ranges are set")
    try:
        import onnx  # noqa: F401
        import onnx_ir as ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PlanishError(f"{error.name} is not installed: pip install 'planish[onnx]'") from None
    from planish.deploy.onnx.half import store_half

    path, prepared = Path(path), find_preprocessing(model, preprocessing)
    task = task_of(model)
    shipped, halved = _halved(model) if constants == "half" else (model, 0)
    graph, lowering, grids = _graph(shipped, prepared, layout, calibration if output_bits else None)
    if constants == "half":
        store_half(graph.graph)
    scheme = _scheme(model)
    card = Card(
        name or str((protocol or getattr(model, "planish_protocol", None) or {}).get("model") or type(model).__name__),
        scheme, _labels(model, graph, classes), prepared, __version__,
        dict(protocol if protocol is not None else getattr(model, "planish_protocol", None) or {}),
    )  # fmt: skip
    task = LABELS if task is CLASSES and len(card.classes) == 1 else task
    graph.metadata_props.update(replace(card, task=task.name).to_metadata())
    content = ir.to_proto(graph).SerializeToString()
    looked, what = (some_images(prepared.input_size), "random images") if images is None else (images, "images")
    found: list[Any] = []

    def check(written: Path) -> None:
        found.extend((compare(model, open_session(written), looked, what), executed(written)))

    write_whole(path, content, check)
    agreement, ran = found
    return Exported(
        path, scheme, layout, len(content), dict(lowering.weights), _as_executed(lowering.forms, ran),
        dict(sorted(ran.kernels.items())), agreement, grids, halved,
    )  # fmt: skip


def _as_executed(forms: Sequence[Any], ran: Executed) -> tuple[Any, ...]:
    """The forms, corrected where the runtime took no integer kernel for what was written for one."""
    why = "ONNX Runtime found no integer kernel for it and computes its codes in float, with the same result"
    return tuple(
        replace(form, kernel="float", why=why, inexact_channels=0) if form.node and form.node in ran.in_float else form
        for form in forms
    )


def _halved(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy with its constants in half precision, and how many of its tensors that changed."""
    twin = copy.deepcopy(model)
    return twin, round_constants(twin, getattr(twin, "planish_assignment", None))


def _graph(model: nn.Module, prepared: Preprocessing, layout: str, calibration: Iterable[Any] | None) -> Any:
    from planish.deploy.onnx.graph import DOMAIN, network_graph
    from planish.deploy.onnx.lower import CONSTANT, Form, Lowering
    from planish.deploy.onnx.operands import product_of
    from planish.deploy.onnx.outputs import add_output_grids
    from planish.deploy.onnx.tidy import tidy

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    graph = network_graph(model, torch.zeros(2, *prepared.input_size, dtype=like.dtype, device=like.device))
    folded = tidy(graph.graph)
    grids = 0
    if calibration is not None:
        batches = (split_batch(batch)[0].float().cpu().numpy() for batch in calibration)
        grids = add_output_grids(graph, batches)
        tidy(graph.graph)
    # with grids of its own the file is no longer the network to the bit
    lowering = Lowering(graph.graph, layout, exact=not grids)
    lowering.forms += [Form(product_of(site), CONSTANT) for site in folded]
    lowering.run()
    if lowering.has_two_bits:
        graph.graph.opset_imports[""] = 25  # the first with 2-bit tensors
    graph.graph.opset_imports.pop(DOMAIN, None)
    return graph, lowering, grids


def _scheme(model: nn.Module) -> str:
    plan: Any = getattr(model, "planish_assignment", None)
    return plan.scheme.name if plan is not None else "float"


def _labels(model: nn.Module, graph: Any, classes: Sequence[str] | None) -> tuple[str, ...]:
    given = None if task_of(model) is FEATURES else find_classes(model, classes)
    shape = graph.graph.outputs[0].shape
    count = shape[-1] if shape is not None and len(shape) == 2 and isinstance(shape[-1], int) else None
    if count is None:
        raise PlanishError(f"{type(model).__name__} does not give logits of shape (images, classes)")
    if given is None:
        kind = {"labels": "label", "features": "feature"}.get(task_of(model).name, "class")
        return tuple(f"{kind} {i}" for i in range(count))
    if len(given) != count:
        raise PlanishError(f"{len(given)} class names for {count} logits: give a name for each, in their order")
    return given
