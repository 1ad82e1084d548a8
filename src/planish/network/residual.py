"""The residual stream of a pre-norm transformer: what writes into it, what reads from it, and how to turn it round.

A LayerNorm takes the mean off, divides by the root mean square of what is left, and applies its affine map. The mean
can be taken off by the layers that write into the stream, and the affine map be applied by those that read from the
norm; what remains is an RMSNorm without parameters, with the same epsilon (the variance is the mean square of the
centred input). It commutes with every rotation of the stream (SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024,
section 3; QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from planish.errors import PlanishError
from planish.network.norm_readers import find_norm_readers
from planish.network.rebuilding import exchange, rebuilder


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model, by paths of modules."""

    width: int
    writers: tuple[str, ...]  # layers whose output channels are the stream's
    tokens: tuple[str, ...]  # parameters of the model: (..., width), added or appended
    norms: tuple[tuple[str, tuple[str, ...]], ...]  # each with the linear layers that read it
    scales: tuple[tuple[str, str], ...]  # layer scales, each with the writer before it


def find_stream(model: Any, example: Any) -> Stream:
    """The residual stream of a model that has the attributes of timm's ``VisionTransformer``.

    That is ``patch_embed.proj``, ``blocks`` of ``norm1``, ``attn.proj``, ``ls1``, ``norm2``, ``mlp.fc2``, ``ls2``, then
    ``norm`` or ``fc_norm``, ``head`` and maybe ``head_dist``. Every parameter of the model itself that has the width of
    the stream as its last dimension is taken for a token or a position.

    Raises:
        PlanishError: the model is of another kind; the sentence says what is missing.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not len(blocks):
        raise PlanishError("the model has no list of blocks, so its residual stream stays as it is")
    width = _linear(model, f"blocks.{len(blocks) - 1}.mlp.fc2").out_features
    readers = {norm: tuple(linears) for norm, linears in find_norm_readers(model, example)}
    writers, norms, scales = [_patches(model, width)], [], []
    for i in range(len(blocks)):
        for norm, writer, scale in (("norm1", "attn.proj", "ls1"), ("norm2", "mlp.fc2", "ls2")):
            path = f"blocks.{i}.{norm}"
            if path not in readers:
                raise PlanishError(
                    f"{path} is not a LayerNorm that only linear layers read, so the stream stays as it is"
                )
            norms.append((path, readers[path]))
            writers.append(f"blocks.{i}.{writer}")
            if not _absent(getattr(blocks[i], scale, None)):
                scales.append((f"blocks.{i}.{scale}", writers[-1]))
    norms.append(_last_norm(model))
    stream = Stream(width, tuple(writers), _tokens(model, width), tuple(norms), tuple(scales))
    _check(model, stream)
    return stream


@torch.no_grad()
def rotate_stream(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Make every LayerNorm of the stream an RMSNorm without parameters and turn the stream by an orthogonal matrix.

    Args:
        rotation: (width, width); the stream x becomes ``rotation @ (x - mean(x))``. The outputs stay the same.
    """
    rotation = rotation.double()
    centred = rotation - rotation.mean(1, keepdim=True)
    for path, writer in stream.scales:
        gamma: Any = model.get_submodule(path).gamma
        _write(model.get_submodule(writer), gamma.double().diag().to(gamma.device))
    for path in stream.writers:
        _write(model.get_submodule(path), centred)
    for name in stream.tokens:
        token: Any = model._parameters[name]
        token.copy_(token.double() @ centred.to(token.device).T)
    for path, linears in stream.norms:
        norm: Any = model.get_submodule(path)
        for linear in linears:
            _read(model.get_submodule(linear), norm, rotation)
    plain_norms(model, [path for path, _ in stream.norms], [path for path, _ in stream.scales])


@rebuilder("rms-norm")
def plain_norms(model: nn.Module, norms: Sequence[str], scales: Sequence[str] = ()) -> list[str]:
    """Put an RMSNorm without parameters in place of each LayerNorm, an identity in place of each layer scale.

    Args:
        norms: paths of the LayerNorms; width and epsilon are kept.
        scales: paths of the layer scales.

    Returns:
        The paths of what was replaced.
    """
    for path in norms:
        old: Any = model.get_submodule(path)
        exchange(model, path, nn.RMSNorm(old.normalized_shape, eps=old.eps, elementwise_affine=False))
    for path in scales:
        exchange(model, path, nn.Identity())
    return [*norms, *scales]


def _write(layer: Any, matrix: Tensor) -> None:
    """Multiply what the layer puts out by the matrix."""
    matrix = matrix.to(layer.weight.device)
    layer.weight.copy_((matrix @ layer.weight.double().flatten(1)).reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(matrix @ layer.bias.double())


def _read(linear: Any, norm: Any, rotation: Tensor) -> None:
    """Take in the affine map of the norm, and the rotation back."""
    weight = linear.weight.double()
    if norm.bias is not None:
        shift = weight @ norm.bias.double()
        if linear.bias is None:
            linear.bias = nn.Parameter(shift.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
        else:
            linear.bias.copy_(linear.bias.double() + shift)
    linear.weight.copy_((weight * norm.weight.double()) @ rotation.to(weight.device).T)


def _patches(model: Any, width: int) -> str:
    """The layer that makes tokens of patches, if nothing stands between it and the stream."""
    layer = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.weight.shape[0] != width:
        raise PlanishError(
            "the model has no layer patch_embed.proj of the stream's width, so the stream stays as it is"
        )
    for owner, name in ((model.patch_embed, "norm"), (model, "norm_pre")):
        if not _absent(getattr(owner, name, None)):
            raise PlanishError(f"the model has a {name} before its first block, so the stream stays as it is")
    return "patch_embed.proj"


def _last_norm(model: Any) -> tuple[str, tuple[str, ...]]:
    norms = [name for name in ("norm", "fc_norm") if not _absent(getattr(model, name, None))]
    heads = [name for name in ("head", "head_dist") if not _absent(getattr(model, name, None))]
    pooled = getattr(model, "attn_pool", None) is not None
    if len(norms) != 1 or pooled or not heads or not all(isinstance(getattr(model, h), nn.Linear) for h in heads):
        raise PlanishError("the model does not end in one norm and linear heads, so its residual stream stays as it is")
    return norms[0], tuple(heads)


def _tokens(model: nn.Module, width: int) -> tuple[str, ...]:
    held = model._parameters.items()
    return tuple(name for name, p in held if p is not None and p.dim() > 1 and p.shape[-1] == width)


def _check(model: nn.Module, stream: Stream) -> None:
    for path, linears in stream.norms:
        norm = model.get_submodule(path)
        if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (stream.width,) or norm.weight is None:
            raise PlanishError(
                f"{path} is no LayerNorm with weights of the stream's width, so the stream stays as it is"
            )
        for linear in linears:
            _linear(model, linear)
    for path in stream.writers[1:]:
        _linear(model, path)
    for path, _ in stream.scales:
        if getattr(model.get_submodule(path), "gamma", torch.empty(0)).shape != (stream.width,):
            raise PlanishError(f"{path} is not a layer scale with one gamma a channel, so the stream stays as it is")


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise PlanishError(f"{path} is not a linear layer, so the residual stream stays as it is")
    return layer


def _absent(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)
