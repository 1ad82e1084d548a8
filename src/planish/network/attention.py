"""Attention spelled out as two matrix products around a softmax.

PyTorch computes attention in fused kernels whose inner operands no hook can reach. These two functions compute the same
values (tested against the fused kernels) from a ``product`` that the caller passes in, so that q, k, the softmax output
and v can be tapped one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[str, tuple[str, str], Tensor, Tensor], Tensor]
Linear = Callable[[Tensor, Any, Any], Tensor]
QK, AV = ("attention_qk", ("query", "key")), ("attention_av", ("probabilities", "value"))


def mix_values(probabilities: Tensor, value: Tensor, product: Product, by_row: bool) -> Tensor:
    """The product of the softmax output (..., L, S) with the values (..., S, Ev).

    With ``by_row`` the product sees every row divided by its largest value, with which its result is multiplied. The
    largest value counts as a constant in the backward pass: what it divides and what it multiplies cancel.
    """
    if not by_row:
        return product(*AV, probabilities, value)
    # a row of zeros, as dropout or a mask may leave it, stays one
    peak = probabilities.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(probabilities.dtype).tiny)
    mixed = product(*AV, probabilities / peak, value)
    return mixed * peak.to(mixed.dtype)  # under autocast the softmax is float32, the product is not


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    product: Product,
    by_row: bool = False,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` as :func:`torch.nn.functional.scaled_dot_product_attention` defines it.

    ``query`` is ``(..., L, E)``, ``key`` ``(..., S, E)``, ``value`` ``(..., S, Ev)``; ``by_row``: :func:`mix_values`.
    """
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    logits = product(*QK, query, key.transpose(-2, -1))
    logits = logits.mul_(1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        causal = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        logits = logits.masked_fill(~causal, -math.inf)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    # a query that may see nothing gets zeros, as from the fused kernels, and not NaN
    probabilities = logits.softmax(-1) if attn_mask is None else torch.ops.aten._safe_softmax(logits, -1)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return mix_values(probabilities, value, product, by_row)


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    product: Product,
    linear: Linear = F.linear,
    by_row: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` (what :class:`torch.nn.MultiheadAttention` calls), sequence first.

    Shapes as in PyTorch: ``query`` is ``(L, N, E)`` or ``(L, E)``. Returns the output and, with ``need_weights``, the
    attention weights. ``linear`` computes the projections; ``by_row``: :func:`mix_values`. ``static_k`` and
    ``static_v`` are not supported.
    """
    if static_k is not None or static_v is not None:
        raise NotImplementedError("multi-head attention with static_k or static_v: leave this module in float (allow=)")
    batched = query.dim() == 3
    weight: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    one = query is key and key is value and not use_separate_proj_weight
    inputs: tuple[Tensor, ...] = (query,) if one else (query, key, value)
    if not batched:
        inputs = tuple(t.unsqueeze(1) for t in inputs)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = inputs[0].shape
    q, k, v = _project(inputs, weight, in_proj_bias, linear)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    q, k, v = (t.reshape(t.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    bias = _merge_masks(attn_mask, key_padding_mask, batch, num_heads, q)
    if is_causal and attn_mask is None:
        bias = torch.full((length, k.size(-2)), -math.inf, device=q.device, dtype=q.dtype).triu(1)
    logits = product(*QK, q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    logits = logits if bias is None else logits + bias
    # without weights to show PyTorch takes the fused kernels here, too
    weights = logits.softmax(-1) if bias is None or need_weights else torch.ops.aten._safe_softmax(logits, -1)
    dropped = F.dropout(weights, dropout_p) if training and dropout_p > 0 else weights
    out = mix_values(dropped, v, product, by_row).permute(2, 0, 1, 3).reshape(length, batch, width)
    out = linear(out, out_proj_weight, out_proj_bias)
    shown: Tensor | None = None
    if need_weights:
        shown = weights.mean(1) if average_attn_weights else weights
        shown = shown if batched else shown.squeeze(0)
    return (out if batched else out.squeeze(1)), shown


def _project(inputs: Sequence[Tensor], weight: Any, bias: Tensor | None, linear: Linear) -> Sequence[Tensor]:
    """Queries, keys and values; of one input, with one weight for the three, in one product, as in PyTorch."""
    if len(inputs) == 1:
        return linear(inputs[0], weight, bias).chunk(3, -1)
    weights = weight.chunk(3) if isinstance(weight, Tensor) else weight
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True)]


def _one_more(mask: Tensor | None) -> Tensor | None:
    """A mask for one more key, which all may see."""
    return None if mask is None else F.pad(mask, (0, 1))


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, like: Tensor
) -> Tensor | None:
    """One additive mask that broadcasts against ``(batch, heads, L, S)``; boolean masks are True where masked out."""

    def additive(mask: Tensor) -> Tensor:
        zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
        return zeros.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask.to(like.dtype)

    merged = None if attn_mask is None else additive(attn_mask)
    if merged is not None and merged.dim() == 3:
        merged = merged.view(batch, heads, *merged.shape[-2:])
    if key_padding_mask is not None:
        padding = additive(key_padding_mask)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged
