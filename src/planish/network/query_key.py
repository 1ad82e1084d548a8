"""One weight in place of two: the product of query and key weights, so that neither oscillates against the other.

The query-key reparameterization of OFQ (Liu et al. 2023, arXiv 2302.02210, section 4.3). The logits of a head are
``(Wq x_i + bq) . (Wk x_j + bk) = x_i . (Wq^T Wk) x_j + (Wk^T bq) . x_j + terms without j``, which softmax cancels. The
paper's code leaves the second term out; with it the network computes what it did before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planish.network.products import preparing_weights
from planish.network.rebuilding import exchange, rebuilder


class QueryKeyAttention(nn.Module):
    """A timm ``Attention`` that multiplies by ``Wq^T Wk``; its parameters keep their names and values.

    The latent parameters stay ``Wq`` and ``Wk``, so gradients pass through the product, whose rank is at most the width
    of a head.
    """

    qkv: nn.Linear
    attn_drop: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.qkv.out_features // (3 * attention.num_heads)
        self.scale: float = attention.scale
        self.training = attention.training

    def query_key_weight(self) -> Tensor:
        """``(heads * (C + 1), C)``: for each head the C rows of ``Wq^T Wk``, and ``Wk^T bq`` as one more row."""
        heads, width = self.num_heads, self.head_dim
        # in float32 as when the network is evaluated: in fewer bits some of the entries would be rounded otherwise
        with preparing_weights(), torch.autocast(self.qkv.weight.device.type, enabled=False):
            query, key, _ = self.qkv.weight.unflatten(0, (3, heads, width)).unbind(0)  # (heads, width, C)
            if self.qkv.bias is not None:
                bias = self.qkv.bias.unflatten(0, (3, heads, width))[0]
                query = torch.cat([query, bias[..., None]], -1)
            else:
                query = F.pad(query, (0, 1))
            return (query.transpose(-2, -1) @ key).flatten(0, 1)

    def logits(self, x: Tensor) -> Tensor:
        """(B, heads, N, N), scaled, less what softmax cancels."""
        channels = x.shape[-1]
        inner = F.linear(x, self.query_key_weight()).unflatten(-1, (self.num_heads, channels + 1))
        inner, offset = inner.split([channels, 1], -1)
        return (torch.einsum("bic,bjhc->bhij", x, inner) + offset.permute(0, 2, 3, 1)) * self.scale

    def attend(self, logits: Tensor, x: Tensor) -> Tensor:
        """The values of ``x``, mixed as the logits say, and projected: (B, N, C)."""
        probabilities = self.attn_drop(logits.softmax(-1))
        bias = None if self.qkv.bias is None else self.qkv.bias.chunk(3)[2]
        value = F.linear(x, self.qkv.weight.chunk(3)[2], bias).unflatten(-1, (self.num_heads, self.head_dim))
        x = (probabilities @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.proj(self.norm(x)))
        return out

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's: ``x`` is (B, N, C); a mask is boolean (True: seen) or added to the logits."""
        tokens, logits = x.shape[1], self.logits(x)
        if is_causal:
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            logits = logits.masked_fill(~causal, float("-inf"))
        if attn_mask is not None:
            seen = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, float("-inf")) if seen else logits + attn_mask
        return self.attend(logits, x)


class QueryKeyWindowAttention(QueryKeyAttention):
    """The same of timm's ``WindowAttention`` (Swin): the bias of relative positions is added to the logits."""

    relative_position_index: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__(attention)
        self.norm = nn.Identity()  # there is none behind it
        self.relative_position_bias_table: nn.Parameter = attention.relative_position_bias_table
        self.register_buffer("relative_position_index", attention.relative_position_index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As timm's: ``x`` is (images * windows, N, C); a mask (windows, N, N) is added to the logits."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, heads)
        logits = self.logits(x) + bias.permute(2, 0, 1)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.attend(logits, x)


@rebuilder("query-key")
def reparameterize_query_key(model: nn.Module) -> list[str]:
    """Rebuild the self-attentions of timm's ``Attention`` and ``WindowAttention`` (Swin) classes in ``model``, in
    place; returns their paths.

    An attention that normalizes queries and keys, or gates its output, is left as it is: there the product of the two
    weights does not appear. So are the attentions of other classes.
    """
    from timm.models.swin_transformer import WindowAttention
    from timm.models.vision_transformer import Attention

    rebuilt = []
    for path, module in list(model.named_modules()):
        if not path:
            continue
        if type(module) is WindowAttention:
            exchange(model, path, QueryKeyWindowAttention(module))
        elif type(module) is Attention and _is_plain(module):
            exchange(model, path, QueryKeyAttention(module))
        else:
            continue
        rebuilt.append(path)
    return rebuilt


def _is_plain(attention: Any) -> bool:
    norms = (attention.q_norm, attention.k_norm)
    return all(isinstance(norm, nn.Identity) for norm in norms) and getattr(attention, "gate", None) is None
