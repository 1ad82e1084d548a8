"""FPQ: features are perturbed at random while the network is trained, and matched with the float network's.

"Feature-Perturbed Quantization" (Pang et al. 2025, arXiv 2503.11159). The base is LSQ with fixed zero points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.batches import call_model
from planish.qat.features import Outputs, OwnHook, layer_axes
from planish.qat.method import Context, Method
from planish.quantizers import TrainableQuantizer
from planish.training import Ingredient
from planish.training.loop import Run

POSITIONS = ("after", "before")
REDUCTIONS = ("mean", "batch-mean", "sum")
EPS = 1e-5


def perturb(x: Tensor, step: Tensor) -> Tensor:
    """``x + d`` with ``d ~ U[-step/2, step/2]`` for every element (section 3.2); no gradient reaches the step."""
    noise = torch.rand_like(x, dtype=torch.float32).sub_(0.5).mul_(step.detach())
    return x + noise.to(x.dtype)


class FeaturePerturbation(Ingredient):
    """Adds noise as large as the rounding error to the input of a layer, with probability ``p`` (SFP, section 3.2).

    One draw decides for the whole tensor of a layer. With every layer perturbed at once the mean of the accumulated
    noise is not zero (proposition 1), hence the gate.

    Args:
        taps: the quantizers of the layers' inputs.
        p: probability, for each layer and forward pass.
        position: ``"after"`` or ``"before"`` the quantizer. Before it, Q(x + d) is stochastic rounding: unbiased inside
            the range, at twice the variance of rounding to nearest.
    """

    def __init__(self, taps: Mapping[str, TrainableQuantizer], p: float = 0.1, position: str = "after") -> None:
        if not 0 <= p <= 1:
            raise PlanishError(f"the probability of a feature perturbation is {p}: it lies in [0, 1]")
        if position not in POSITIONS:
            raise PlanishError(f"features are perturbed {position!r} the quantizer: choose {' or '.join(POSITIONS)}")
        self.taps, self.p, self.position = dict(taps), p, position
        self.handles: list[Any] = []

    def start(self, run: Run) -> None:
        for tap in self.taps.values() if self.p else ():
            if self.position == "before":
                self.handles.append(tap.register_forward_pre_hook(OwnHook(lambda tap, args: self._on(tap, args[0]))))
            else:
                self.handles.append(tap.register_forward_hook(OwnHook(lambda tap, args, out: self._on(tap, out))))

    def _on(self, tap: Any, x: Tensor) -> Tensor:
        if not tap.training or torch.rand(()) >= self.p:  # drawn on the CPU, so that no device has to be waited for
            return x
        return perturb(x, tap.grid.scale)

    def finish(self, run: Run) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def standardize(z: Tensor, channel_axis: int = 1, eps: float = EPS) -> Tensor:
    """Each channel with mean 0 and variance 1 over everything else: ``(z - mean) / sqrt(var + eps)`` (section 3.3)."""
    dims = _others(z, channel_axis)
    centred = z - z.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _others(z: Tensor, channel_axis: int) -> list[int]:
    return [d for d in range(z.dim()) if d != channel_axis % z.dim()]


class _ChannelDistance(torch.autograd.Function):
    """``mean (target - standardize(z))^2`` for every channel, with ``target`` standardized and without a gradient.

    Written out, so that nothing as large as a layer's output is kept for the backward pass but the two that are there
    anyway. With ``r = 1 / sqrt(var + eps)``, ``q = mean(target (z - mean))`` and M values a channel, the distance is
    ``mean(target^2) + r^2 var - 2 r q`` and its gradient ``2/M ((eps r^4 + q r^3) (z - mean) - r target)``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, dims: list[int]) -> Tensor:
        mean = z.mean(dims, keepdim=True)
        centred = z - mean
        shared = (centred * target).mean(dims, keepdim=True)
        variance = centred.square_().mean(dims, keepdim=True)
        inverse = torch.rsqrt(variance + EPS)
        ctx.save_for_backward(z, target, mean, shared, inverse)
        return target.square().mean(dims, keepdim=True) + variance * inverse.square() - 2 * inverse * shared

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        z, target, mean, shared, inverse = ctx.saved_tensors
        each = gradients[0] * (2 * mean.numel() / z.numel())
        slope = each * (EPS * inverse**4 + shared * inverse**3)
        return (z - mean).mul_(slope).addcmul_(target, -each * inverse), None, None


def distance_to(student: Tensor, target: Tensor, reduction: str = "mean", channel_axis: int = 1) -> Tensor:
    """:func:`standardized_distance` to a teacher's output that :func:`standardize` has been applied to already."""
    channels: Tensor = _ChannelDistance.apply(student.float(), target, _others(student, channel_axis))
    if reduction == "mean":
        return channels.mean()
    total = channels.sum() * (student.numel() // channels.numel())
    return total if reduction == "sum" else total / len(student)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise PlanishError(f"the reduction of the distillation is {reduction!r}: choose {', '.join(REDUCTIONS)}")


def standardized_distance(student: Tensor, teacher: Tensor, reduction: str = "mean", channel_axis: int = 1) -> Tensor:
    """``|| standardize(teacher) - standardize(student) ||^2``, summed (CSD, section 3.3), or its mean.

    The sum is ``2 M sum_c (1 - rho_c)``, with rho_c the Pearson correlation of channel c and M its number of values; so
    the mean lies in [0, 4]. ``"batch-mean"`` divides the sum by the number of images. No gradient reaches the teacher.

    Args:
        student, teacher: outputs of one layer, of any shape with the batch first; computed in float32.
        reduction: ``"mean"``, ``"batch-mean"`` or ``"sum"``.
        channel_axis: 1 for a convolution, -1 for a linear layer.

    Raises:
        PlanishError: another reduction.
    """
    _check_reduction(reduction)
    return distance_to(student, standardize(teacher.detach().float(), channel_axis), reduction, channel_axis)


class ChannelStandardizedDistillation(Ingredient):
    """``weight`` times the distance of the standardized outputs of every quantized layer from the float network's.

    Args:
        teacher: the network in float; it is frozen.
        layers: the layers' paths, the same in both networks, with the channel axis of their outputs.
        reduction: how a layer's distance is reduced, see :func:`standardized_distance`. The paper's formula is the
            sum, which outweighs the cross-entropy by orders of magnitude; with ``"mean"`` the layers are averaged, too.
    """

    def __init__(
        self, teacher: nn.Module, layers: Mapping[str, int], weight: float = 10.0, reduction: str = "mean"
    ) -> None:
        _check_reduction(reduction)
        if weight < 0:
            raise PlanishError(f"the weight of the distillation is {weight}: it is positive, or 0 for none")
        if not layers:
            raise PlanishError(
                "fpq finds no linear layer or convolution that is quantized, so it has nothing to distil: set csd to 0"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.layers, self.weight, self.reduction = dict(layers), weight, reduction
        self.ours: Outputs | None = None  # until start, which a failure elsewhere may forestall
        self.theirs: Outputs | None = None
        self.target: dict[str, Tensor] = {}  # the teacher's outputs, standardized

    def start(self, run: Run) -> None:
        self.ours, self.theirs = Outputs(run.model, self.layers), Outputs(self.teacher, self.layers)

    def before_part(self, run: Run, inputs: Any, labels: Tensor | None) -> None:
        assert self.ours is not None
        assert self.theirs is not None
        with torch.no_grad(), run.accelerator.autocast():
            call_model(self.teacher, inputs)
        seen = self.theirs.take()
        # one after the other, so that there is one set of outputs and not two
        self.target = {path: standardize(seen.pop(path).float(), self.layers[path]) for path in tuple(seen)}
        self.ours.take()

    def loss(self, run: Run, inputs: Any, labels: Tensor | None, logits: Tensor) -> Tensor | None:
        assert self.ours is not None
        seen = self.ours.take()
        distances = [
            distance_to(seen[path], self.target[path], self.reduction, axis)
            for path, axis in self.layers.items()
            if path in seen and path in self.target  # a layer may be skipped in training (stochastic depth)
        ]
        if not distances:
            raise PlanishError("no quantized linear layer or convolution was run, so there is nothing to distil from")
        total = torch.stack(distances).sum()
        return self.weight * (total / len(distances) if self.reduction == "mean" else total)

    def after_step(self, run: Run) -> None:
        self.target = {}  # before the next batch's are computed: only one set is held at a time

    def finish(self, run: Run) -> None:
        for outputs in (self.ours, self.theirs):
            if outputs is not None:
                outputs.remove()
        self.target = {}


@dataclass(frozen=True)
class FPQ(Method):
    """Feature perturbation and channel-wise standardized distillation over LSQ.

    Attributes:
        p: probability with which the input of a layer is perturbed (the paper's best of 0 to 1 is 0.1).
        position: perturb ``after`` or ``before`` the quantizer of the input.
        csd: weight of the distillation; 0 for none. The paper has 1 with the sum. On held-out images, with the mean,
            3 and 10 did equally well on both embedded networks and 1 less.
        reduction: ``mean``, ``batch-mean`` or ``sum`` (the paper's formula).
    """

    name: ClassVar[str] = "fpq"
    summary: ClassVar[str] = "perturbed features, and distillation of standardized channels"
    paper: ClassVar[str] = "Pang et al. 2025, arXiv 2503.11159"

    p: float = 0.1
    position: str = "after"
    csd: float = 10.0
    reduction: str = "mean"

    def ingredients(self, context: Context) -> list[Ingredient]:
        layers = context.layers()
        inputs = [s.name for product in layers for s in product.sites if s.role == "input" and s.name in context.taps]
        parts = super().ingredients(context)
        if self.csd:
            axes = layer_axes(context.model, layers)
            teacher = context.channel_teacher(self.name)
            parts.append(ChannelStandardizedDistillation(teacher, axes, self.csd, self.reduction))
        if self.p:
            parts.append(FeaturePerturbation({n: context.taps[n] for n in inputs}, self.p, self.position))
        return parts
