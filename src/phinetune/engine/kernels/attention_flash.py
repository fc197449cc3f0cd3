"""Causal attention over packed segments in 16 bits on a GPU, by torch's flash attention for rows of unlike length.

One call computes all segments (Dao 2023, FlashAttention-2). The causal mask is aligned at the ends of a segment's
queries and of its keys, so a branch's queries see all tokens of its ancestors and, causally, their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.attention_plan import Contexts, Heads
from phinetune.engine.kernels.matmul import HALF_DTYPES
from phinetune.engine.segments import Segment

WIDEST = 256  # features of a head
AGAIN = 8  # how many keys a token may stand for on average, the ancestors' tokens being copied for each branch


def takes(like: Tensor, heads: Heads, segments: Sequence[Segment]) -> bool:
    """Whether it computes attention for states of `like`'s dtype and device, within these segments."""
    if like.device.type != "cuda" or torch.version.hip or like.dtype not in HALF_DTYPES:
        return False
    if heads.size % 8 or heads.size > WIDEST or torch.cuda.get_device_capability(like.device)[0] < 8:
        return False
    seen = sum(stop - start for segment in segments for start, stop in segment.above)
    return seen <= (AGAIN - 1) * sum(map(len, segments))


def forward(qkv: Tensor, contexts: Contexts, heads: Heads) -> tuple[Tensor, ...]:
    """Given qkv with rotated queries and keys.

    Returns:
        the output, shape (tokens, heads · size), and what the backward needs besides.
    """
    q, k, v = _split(qkv, contexts, heads)
    causal, window = _mask(contexts, heads)
    out, log_sums, *state, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_lengths(contexts), 0.0, causal, False, **window
    )
    return out.flatten(1), log_sums, *state


def backward(
    grad: Tensor, qkv: Tensor, contexts: Contexts, heads: Heads, out: Tensor, log_sums: Tensor, *state: Tensor
) -> Tensor:
    """The gradient of the rotated qkv, given that of the output, and what the forward returned."""
    q, k, v = _split(qkv, contexts, heads)
    causal, window = _mask(contexts, heads)
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        grad.reshape(q.shape), q, k, v, out.view(q.shape), log_sums, *_lengths(contexts), 0.0, causal, *state, **window
    )
    if contexts.tokens is None:
        return torch.cat([d_q, d_k, d_v], dim=1).view_as(qkv)
    # A shared token has a gradient from each branch; they are added up in float32.
    d_kv = qkv.new_zeros(len(qkv), 2 * heads.kv_heads, heads.size, dtype=torch.float32)
    d_kv.index_add_(0, contexts.tokens, torch.cat([d_k, d_v], dim=1).float())
    return torch.cat([d_q, d_kv.to(qkv.dtype)], dim=1).view_as(qkv)


def _split(qkv: Tensor, contexts: Contexts, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (tokens, heads, size), keys and values of the contexts (keys, kv_heads, size)."""
    states = qkv.view(len(qkv), heads.total, heads.size)
    q, kv = states.split([heads.heads, 2 * heads.kv_heads], dim=1)
    if contexts.tokens is not None:
        kv = kv.index_select(0, contexts.tokens)
    k, v = kv.chunk(2, dim=1)
    return q, k, v


def _lengths(contexts: Contexts) -> tuple[Any, ...]:
    return contexts.queries, contexts.keys, *contexts.longest


def _mask(contexts: Contexts, heads: Heads) -> tuple[bool, dict[str, Any]]:
    """Whether the mask is causal alone, and the scale with the window: keys before a query's own, and after it."""
    crossed = heads.window is not None and heads.window < contexts.longest[1]
    before = heads.window - 1 if crossed and heads.window is not None else -1
    return not crossed, {"scale": heads.scaling, "window_size_left": before, "window_size_right": 0}
