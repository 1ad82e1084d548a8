"""What ONNX Runtime makes of a file: the kernels it chose, its answers beside the model's, its milliseconds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planish.deploy.card import INPUT
from planish.deploy.onnx.quiet import quiet
from planish.errors import PlanishError
from planish.network.batches import logits_of, split_batch
from planish.network.modes import evaluating
from planish.task import CLASSES, LABELS, Task, task_of

INTEGER = {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QGemm",
           "DynamicQuantizeMatMul", "QLinearAdd", "QLinearAveragePool", "QLinearGlobalAveragePool"}  # fmt: skip
FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm",
         "MatMulNBits", "Einsum", "Attention", "MultiHeadAttention"}  # fmt: skip
TIE = 1e-3  # two logits nearer than this may come out in either order


def open_session(model: Path | bytes, *, threads: int = 1, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU with all its optimizations.

    Raises:
        PlanishError: ONNX Runtime is missing, or does not take the file.
    """
    try:
        import onnxruntime
    except ImportError:
        raise PlanishError("ONNX Runtime is not installed: pip install 'planish[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes have no public base
        line = str(error).strip().splitlines()[0]
        raise PlanishError(f"ONNX Runtime {onnxruntime.__version__} does not take the graph: {line}") from error


@dataclass(frozen=True)
class Executed:
    """The graph that ONNX Runtime really executes: how often each kernel stands in it (``kernels``), and the names of
    the products that it computes in float although their operands are codes (``in_float``)."""

    kernels: Counter[str]
    in_float: frozenset[str]


def executed(model: Path) -> Executed:
    """What ONNX Runtime makes of a file. A product on codes that found no kernel keeps its name and its operands."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        open_session(model, optimized=target)
        nodes = onnx.load(target).graph.node
    widened = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    found = {node.name for node in nodes if node.op_type in FLOAT and widened & set(node.input[:2])}
    return Executed(Counter(node.op_type for node in nodes), frozenset(found))


def kernels(model: Path) -> Counter[str]:
    """How often each kernel stands in the graph that ONNX Runtime really executes."""
    return executed(model).kernels


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the same images.

    ``differing`` has, for each image with another first class, its number and its margin: the distance of the model's
    two largest logits; of labels, the largest logit among those that changed sides; of features, how far the cosine is
    from 1 where it is more than ``TIE``. ``beyond_ties`` are those with a margin above ``TIE``. ``same``: what the
    others have in common.
    """

    images: int
    differing: tuple[tuple[int, float], ...]
    largest: float  # largest difference of a logit
    what: str = "images"
    same: str = CLASSES.same

    @property
    def top1(self) -> float:
        return 1 - len(self.differing) / max(1, self.images)

    @property
    def beyond_ties(self) -> tuple[tuple[int, float], ...]:
        return tuple(entry for entry in self.differing if entry[1] > TIE)


@torch.no_grad()
def compare(model: nn.Module, session: Any, images: Iterable[Any], what: str = "images") -> Agreement:
    """Put every image through the PyTorch model and the file; batches may be tensors or (tensor, label)."""
    differing: list[tuple[int, float]] = []
    count, largest, task = 0, 0.0, CLASSES
    with evaluating(model):
        for batch in images:
            batch = split_batch(batch)[0]
            expected = logits_of(model(batch)).float().cpu().numpy()
            (got,) = session.run(None, {INPUT: batch.float().cpu().numpy()})
            task = task_of(model, torch.from_numpy(expected))
            differing += [(count + index, margin) for index, margin in _differing(task, expected, got)]
            # a logit that is not finite must not hide behind comparisons with NaN
            with np.errstate(invalid="ignore"):
                apart = np.where((expected == got) | (np.isnan(expected) & np.isnan(got)), 0, np.abs(expected - got))
            largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
            count += len(expected)
    if not count:
        raise PlanishError("there are no images to compare the exported file on")
    return Agreement(count, tuple(differing), largest, what, task.same)


def _differing(task: Task, expected: np.ndarray, got: np.ndarray) -> list[tuple[int, float]]:
    """The places of the images about which both say something else, each with its margin; see :class:`Agreement`."""
    if task is CLASSES:
        ordered = np.sort(expected, axis=1)
        apart, margins = expected.argmax(1) != got.argmax(1), ordered[:, -1] - ordered[:, -2]
    elif task is LABELS:
        changed = (expected > 0) != (got > 0)
        apart, margins = changed.any(1), np.where(changed, np.abs(expected), 0).max(1)
    else:
        margins = 1 - task.alike(torch.from_numpy(expected), torch.from_numpy(got)).numpy()
        apart = margins > TIE
    return [(int(index), float(margins[index])) for index in np.flatnonzero(apart)]


def some_images(shape: tuple[int, int, int], count: int = 8) -> list[Tensor]:
    """Random images for a first look, the same ones every time."""
    return [torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))]


def milliseconds(
    models: Mapping[str, Path], shape: tuple[int, int, int], batch: int, *, threads: int = 1, repeats: int = 20
) -> dict[str, float]:
    """Median milliseconds of each file for one batch, taking turns in one process, so that a busy moment meets all."""
    sessions = {name: open_session(path, threads=threads) for name, path in models.items()}
    images = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    feeds = {name: {session.get_inputs()[0].name: images} for name, session in sessions.items()}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repeats + 2):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= 2:
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def quantize_static(model: Path, target: Path, images: Iterable[Any]) -> None:
    """ONNX Runtime's own eight-bit quantization of a float file: QDQ, weights per channel, ranges by min and max."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as theirs
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = split_batch(next(self.batches, None))[0]
            return None if batch is None else {INPUT: batch.float().cpu().numpy()}

    with quiet(""), tempfile.TemporaryDirectory() as folder:  # it warns about axes of norms
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        theirs(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
