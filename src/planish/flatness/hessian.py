"""The Hessian of a network's loss as an operator: products with vectors, without ever holding the matrix.

A product is a gradient of a gradient (Pearlmutter 1994, "Fast exact multiplication by the Hessian"): the gradient is
computed once with its graph, and every vector then costs one more backward pass through that graph. The graphs are
kept as far as the memory allows, so that repeated products do not start from the images again. On both embedded
networks this was faster than forward-over-reverse differentiation and than batching the vectors with ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from planish.errors import PlanishError
from planish.flatness.graphs import plan_graphs
from planish.network.batches import call_model, logits_of, split_batch, to_device
from planish.network.modes import evaluating

Loss = Callable[[Tensor, Tensor], Tensor]
MEMORY = 2 << 30  # bytes
NEAR = 48 << 20  # bytes of a graph on a CPU: with 32 MB of cache, products took least time around it (see graphs.FEW)


class Hessian:
    """``v -> H v``, where H is the Hessian of the mean loss over all images with respect to some parameters.

    The model runs in evaluation mode: BatchNorm normalizes with its running statistics and leaves them as they are.
    Modes and ``requires_grad`` are as they were after every product. The parameters must not change while the operator
    is in use.

    Args:
        model: a classifier in float32 or float64.
        batches: (inputs, labels); each process passes its own.
        parameters: by name; default: all of the model.
        loss: of (logits, labels), a mean over the images of a batch; default: cross-entropy in nats.
        memory: bytes that may go to graphs. Batches are cut so that one graph takes at most a quarter of it.
        accelerator: sums over the processes; without one, this process is alone.

    Attributes:
        parameters: by name, in the order in which a flat vector holds them.
        size: number of weights.
        images: number of images, over all processes.
        products: how many products were computed so far.
        notify: called after each of them.

    Raises:
        PlanishError: no images, no labels, no parameters, parameters of another model, or in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        parameters: Mapping[str, nn.Parameter] | None = None,
        loss: Loss = F.cross_entropy,
        *,
        memory: int = MEMORY,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.model, self.loss, self.memory, self.accelerator = model, loss, memory, accelerator
        self.parameters = dict(model.named_parameters() if parameters is None else parameters)
        first = self._checked()
        self.device, self.dtype = first.device, first.dtype
        self._sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.size = sum(self._sizes)
        split: list[Any] = [split_batch(batch) for batch in batches]
        if any(labels is None for _, labels in split):
            raise PlanishError(
                "curvature needs a loss and so labels, but a batch has images only: pass (images, labels)"
            )
        count = torch.tensor(sum(len(labels) for _, labels in split), device=self.device)
        self.images = int(self._summed(count))
        if not self.images:
            raise PlanishError("the curvature of a loss needs images, but there is no batch: pass at least one")
        self.products, self.notify = 0, lambda: None
        with self._ready():
            near = NEAR if self.device.type == "cpu" else None
            held = list(model.parameters())
            self._chunks, self._kept = plan_graphs(split, self._gradients, memory, held, near=near)
        self._graphs: dict[int, list[Tensor]] = {}

    @property
    def block(self) -> int:
        """Vectors that are best multiplied at once: they share the graphs that are not kept."""
        if self._kept == len(self._chunks):
            return 1
        return max(1, self.memory // (8 * self.size * self.dtype.itemsize))

    def matvec(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H times a vector that is given, and comes back, as one tensor for each parameter."""
        flat = torch.cat([part.reshape(-1) for part in vector]).to(self.device, self.dtype)
        return self.split(self.multiply(flat[None])[0])

    def multiply(self, vectors: Tensor) -> Tensor:
        """H times flat vectors, (k, size) to (k, size); every process gets the whole result."""
        total = torch.zeros_like(vectors)
        with self._ready():
            for i, (inputs, labels) in enumerate(self._chunks):
                gradients = self._graphs[i] if i in self._graphs else self._gradients(inputs, labels)
                keep = i < self._kept
                if keep:
                    self._graphs[i] = gradients
                for row, vector in enumerate(vectors):
                    total[row] += self._product(gradients, vector, again=keep or row + 1 < len(vectors))
                del gradients
        total = self._summed(total)
        if not torch.isfinite(total).all():
            raise PlanishError(
                "a product with the Hessian is not finite: check images, weights and loss for NaN and infinity"
            )
        self.products += len(vectors)
        self.notify()
        return total

    def dense(self) -> Tensor:
        """The matrix itself, (size, size), float64, on the CPU: one product for each weight."""
        found = torch.empty(self.size, self.size, dtype=torch.float64)
        for start in range(0, self.size, 64):
            stop = min(start + 64, self.size)
            units = torch.zeros(stop - start, self.size, dtype=self.dtype, device=self.device)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            found[start:stop] = self.multiply(units)
        return (found + found.T) / 2

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat vector as one tensor for each parameter, in its shape."""
        parts = flat.split(self._sizes)
        return [part.view_as(p) for part, p in zip(parts, self.parameters.values(), strict=True)]

    def blocks(self, flat: Tensor) -> Sequence[Tensor]:
        """The entries of each parameter, (..., size) to one (..., weights) for each."""
        return flat.split(self._sizes, -1)

    def layer_sums(self, flat: Tensor) -> Tensor:
        """The sum over each parameter's entries: (..., size) to (..., parameters), float64, on the CPU."""
        return torch.stack([part.sum(-1, dtype=torch.float64) for part in self.blocks(flat)], -1).cpu()

    def _gradients(self, inputs: Any, labels: Tensor) -> list[Tensor]:
        """The part of the loss's gradient that comes from these images, with its graph."""
        logits = logits_of(call_model(self.model, to_device(inputs, self.device)))
        loss = self.loss(logits, labels.to(self.device)) * (len(labels) / self.images)
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in self.parameters.values()]
        chosen = list(self.parameters.values())
        return list(torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True, materialize_grads=True))

    def _product(self, gradients: list[Tensor], vector: Tensor, again: bool) -> Tensor:
        pairs = [(g, v) for g, v in zip(gradients, self.split(vector), strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear in the parameters, or does not depend on them
            return torch.zeros_like(vector)
        outputs, weights = zip(*pairs, strict=True)
        chosen = list(self.parameters.values())
        found = torch.autograd.grad(
            outputs, chosen, weights, retain_graph=again, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in found])

    def _checked(self) -> nn.Parameter:
        """The first parameter, when all of them can be differentiated twice."""
        own = {id(parameter) for parameter in self.model.parameters()}
        for name, parameter in self.parameters.items():
            if id(parameter) not in own:
                raise PlanishError(f"{name} is not a parameter of the model: take those of its named_parameters()")
        kinds = {parameter.dtype for parameter in self.parameters.values()}
        if not kinds:
            raise PlanishError("there are no parameters to differentiate with respect to: pass at least one")
        if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
            found = ", ".join(sorted(map(str, kinds)))
            raise PlanishError(
                f"curvature needs all parameters in float32, or all in float64, got {found}: use .float()"
            )
        return next(iter(self.parameters.values()))

    def _summed(self, tensor: Tensor) -> Tensor:
        return tensor if self.accelerator is None else self.accelerator.reduce(tensor, "sum")  # type: ignore[return-value]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Everything as double differentiation needs it; afterwards as it was."""
        before = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        chosen = {id(parameter) for parameter in self.parameters.values()}
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
            stack.enter_context(_full_precision(self.device))
            stack.enter_context(evaluating(self.model))
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in chosen)
            try:
                yield
            finally:
                for parameter, flag in before:
                    parameter.requires_grad_(flag)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32: its 10 bits of mantissa are too few for derivatives of derivatives."""
    if device.type != "cuda":
        yield
        return
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
