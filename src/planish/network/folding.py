"""Fold BatchNorm into the convolution or linear layer before it, so that one weight is quantized, not two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from planish.errors import PlanishError
from planish.network.batches import call_model
from planish.network.modes import evaluating
from planish.network.products import SIGNATURES, Signature

TOLERANCE = 1e-3  # largest change of an output, relative to its largest magnitude, that folding may cause


@dataclass
class _Made:
    """What a layer put out, and the very weight that it was multiplied with."""

    output: Tensor
    weight: Tensor
    bias: Tensor | None
    signature: Signature


class _Reader(TorchFunctionMode):
    """Notes which tensors come out of layers, which go into BatchNorm, and how often each tensor is read at all."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.normed: list[tuple[_Made, Tensor]] = []  # with the running mean, which tells whose norm it is
        self.reads: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not tensors_in(result):  # a question about shape or dtype
            return result
        self.reads.update(id(tensor) for tensor in tensors_in((args, kwargs)))
        signature = SIGNATURES.get(func)
        if signature is not None and signature.weighted:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            self.reads[id(result)] = 0  # an earlier tensor, gone by now, may have had its address
            self.made[id(result)] = _Made(result, weight, bias, signature)
        elif func is F.batch_norm:
            x = args[0] if args else kwargs["input"]
            mean = args[1] if len(args) > 1 else kwargs["running_mean"]
            if id(x) in self.made and mean is not None:
                self.normed.append((self.made[id(x)], mean))
        return result


def find_pairs(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """(layer, BatchNorm) pairs such that the norm, and nobody else, reads the very tensor that the layer multiplied.

    Found by watching one forward pass. The layer must multiply with its parameter as it is (no standardized weights),
    and what belongs to the pair must be used once: a layer that runs twice, a tied weight, an output that a shortcut
    reads as well or that the model returns, or one changed in place are all left alone.
    """
    reader = _Reader()
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), reader:
        returned = call_model(model, example)
    reads = reader.reads + Counter(id(tensor) for tensor in tensors_in(returned))
    layers = {
        id(m._parameters["weight"]): (n, m) for n, m in model.named_modules() if m._parameters.get("weight") is not None
    }
    norms = {
        id(m.running_mean): (n, m)
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    pairs = []
    for made, mean in reader.normed:
        if id(made.weight) not in layers or id(mean) not in norms:
            continue
        (layer_path, layer), (norm_path, norm) = layers[id(made.weight)], norms[id(mean)]
        own_bias = layer._parameters.get("bias") is made.bias
        # a norm divides along dimension 1; that is where a layer puts its channels, save for (batch, tokens, channels)
        along_channels = made.output.dim() == made.weight.dim() and hasattr(layer, "bias")
        inside = [made.output, made.weight, mean, *(t for t in (made.bias, norm.weight, norm.bias) if t is not None)]
        if own_bias and along_channels and all(reads[id(tensor)] == 1 for tensor in inside):
            pairs.append((layer_path, norm_path))
    return pairs


@torch.no_grad()
def fold_batchnorm(model: nn.Module, example: Any) -> list[tuple[str, str]]:
    """Fold every foldable BatchNorm of ``model`` in place and return the pairs that were folded.

    A folded norm becomes the identity that keeps whatever activation its class applies (timm's ``BatchNormAct2d``): its
    statistics are set to mean 0, variance 1 - eps, weight 1, bias 0 and it stays in evaluation mode. The outputs on
    ``example`` are compared: if they change by more than ``TOLERANCE``, the pairs are folded one by one and those that
    change them are left as they were.
    """
    pairs = find_pairs(model, example)
    if not pairs:
        return []
    before = outputs(model, example)
    undo = [_fold(model, *pair) for pair in pairs]
    if same_outputs(outputs(model, example), before):
        return pairs
    for saved in reversed(undo):
        saved.restore()
    folded = []
    for pair in pairs:
        saved = _fold(model, *pair)
        if same_outputs(outputs(model, example), before):
            folded.append(pair)
        else:
            saved.restore()
    return folded


@torch.no_grad()
def unfold_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give every folded BatchNorm of ``model`` statistics to normalize by, in place; returns how many there were.

    They are those of its input over ``batches``, and its affine map becomes the one that undoes them. So outputs stay
    what they are, also those of a quantized network, which can be trained with batch statistics again: the identity
    that folding leaves would normalize its input there, and nothing would scale it back.

    Raises:
        PlanishError: a folded norm lacks a scale or a shift; the network stays as it is.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and _is_folded(m)}
    if bare := next((name for name, norm in found.items() if norm.weight is None or norm.bias is None), None):
        raise PlanishError(
            f"{bare}: this BatchNorm without scale and shift was folded into the layer before it, so it cannot be "
            "trained with the statistics of its batches: start from the network in float, or freeze_batchnorm=True"
        )
    norms = list(found.values())
    seen = [_Moments(norm) for norm in norms]
    try:
        with evaluating(model):
            for batch in batches if norms else ():
                call_model(model, batch)
    finally:
        for moments in seen:
            moments.handle.remove()
    for norm, moments in zip(norms, seen, strict=True):
        if moments.count:
            _unfold(norm, moments.mean, (moments.square - moments.mean.square()).clamp_(min=0))
    return sum(moments.count > 0 for moments in seen)


def has_folded_batchnorm(model: nn.Module) -> bool:
    """Whether a BatchNorm of ``model`` was folded into the layer before it."""
    return any(isinstance(m, _BatchNorm) and _is_folded(m) for m in model.modules())


def _is_folded(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not mean.any() and bool((variance == 1.0 - norm.eps).all())


def _unfold(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.bias.copy_(norm.bias + norm.weight * mean)
    norm.weight.copy_(norm.weight * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


class _Moments:
    """Mean and mean square of what enters a norm, for each channel."""

    def __init__(self, norm: nn.Module) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())
        self.handle = norm.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1).float()
        self.count += x.shape[1]
        share = x.shape[1] / self.count
        variance, mean = torch.var_mean(x, 1, correction=0)
        self.mean = self.mean + share * (mean - self.mean)
        self.square = self.square + share * (variance + mean.square() - self.square)


class _Saved:
    """The tensors of a layer and its norm before they were folded."""

    def __init__(self, layer: Any, norm: Any) -> None:
        self.layer, self.norm, self.training, self.bias = layer, norm, norm.training, layer._parameters["bias"]
        tensors = [layer.weight, self.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
        self.values = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]

    def restore(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)
        self.layer._parameters["bias"] = self.bias
        self.norm.train(self.training)


def _fold(model: nn.Module, layer_path: str, norm_path: str) -> _Saved:
    layer: Any = model.get_submodule(layer_path)
    norm: Any = model.get_submodule(norm_path)
    saved = _Saved(layer, norm)
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
    weight = layer.weight
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out of one group, ...)
        per_in = scale.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
        weight.mul_(per_in.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2)))
    else:
        weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        layer.bias.mul_(scale).add_(shift)
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.zero_()
    norm.eval()
    return saved


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.inference_mode(False), evaluating(model):
        return [tensor for tensor in tensors_in(call_model(model, example)) if tensor.is_floating_point()]


def same_outputs(now: list[Tensor], before: list[Tensor]) -> bool:
    """Whether outputs agree; what was not finite before says nothing."""
    for a, b in zip(now, before, strict=True):
        finite = b.isfinite()
        if bool(finite.any()) and not bool(((a - b)[finite].abs() <= TOLERANCE * b[finite].abs().max()).all()):
            return False
    return True


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_in(getattr(value, field.name))]
    return []
