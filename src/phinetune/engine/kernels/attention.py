"""Causal attention over packed segments by matrix products, with its own backward.

Segments of like length are computed together. A block of queries sees a prefix of its segment's context, so each
block is one product, one softmax over whole rows and another product; nothing is computed above the diagonal but the
block's own corner, and memory grows with the length, not with its square. Query heads that share a key head
(grouped-query attention) are stacked as rows. The backward computes the softmax again from queries and keys (Dao et
al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.engine.attention_plan import AttentionRun, Groups, Heads, Placed
from phinetune.engine.kernels.matmul import scratch, widened, work_dtype
from phinetune.engine.kernels.rotary import rotate_

BLOCK = 64  # queries whose scores are computed at a time
SCORES = 1 << 20  # scores alive at a time, of several heads where they fit


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[AttentionRun], heads: Heads) -> Tensor:
    """Rotate queries and keys, attend within segments.

    Args:
        qkv: the fused projection's output, shape (tokens, (heads + 2 · kv_heads) · size); overwritten.
        cos, sin: shape (tokens, m) for the first 2·m features of each head.
        runs: `plan`'s, covering the tokens in order.

    Returns:
        shape (tokens, heads · size).
    """
    if len(runs) == 1 and runs[0].groups is not None:
        return _in_groups(qkv, cos, sin, runs[0].groups, heads)
    qkv = _Rotate.apply(qkv, cos, sin, heads)  # type: ignore[no-untyped-call]
    parts = qkv.split([run.length for run in runs])
    return torch.cat([_attend(part, run, heads) for part, run in zip(parts, runs, strict=True)])


def _attend(qkv: Tensor, run: AttentionRun, heads: Heads) -> Tensor:
    """A run's tokens, already rotated."""
    return _fused(qkv, heads) if run.groups is None else _in_groups(qkv, None, None, run.groups, heads)


def _in_groups(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Groups, heads: Heads) -> Tensor:
    out: Tensor = _Attention.apply(qkv, cos, sin, groups, heads)  # type: ignore[no-untyped-call]
    return out


def _fused(qkv: Tensor, heads: Heads) -> Tensor:
    q, k, v = (part.transpose(0, 1)[None] for part in _split(qkv, heads))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scaling, enable_gqa=heads.shared > 1)
    return out[0].transpose(0, 1).reshape(len(qkv), -1)


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries (tokens, heads, size), keys and values (tokens, kv_heads, size)."""
    q, k, v = qkv.view(len(qkv), -1, heads.size).split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    return q, k, v


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, *, back: bool = False) -> Tensor:
    """Rotate queries and keys in place."""
    states = qkv.view(len(qkv), -1, heads.size)[:, : heads.heads + heads.kv_heads]
    rotate_(states, cos, sin, back=back)
    return qkv


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
        _turn(qkv, cos, sin, heads)
        ctx.mark_dirty(qkv)
        ctx.heads = heads
        ctx.save_for_backward(cos, sin)
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad.clone(), cos, sin, ctx.heads, back=True), None, None, None


class _Attention(torch.autograd.Function):
    """Rotates in place first where cos and sin are given. Keeps the rotated qkv alone."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Groups, heads: Heads) -> Tensor:
        if cos is not None and sin is not None:
            _turn(qkv, cos, sin, heads)
        sizes = [one.out.numel() for one in groups.placed]
        given = qkv.new_empty(sum(sizes), heads.size)
        for one, rows in zip(groups.placed, given.split(sizes), strict=True):
            _group_forward(qkv, one, rows, heads)
        ctx.groups, ctx.heads = groups, heads
        ctx.save_for_backward(qkv, cos, sin)
        return given.index_select(0, groups.out).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        groups: Groups = ctx.groups
        heads: Heads = ctx.heads
        sizes = [one.q.numel() + 2 * one.batch * one.length for one in groups.placed]
        given = qkv.new_empty(sum(sizes), heads.size)
        above: list[tuple[Tensor, Tensor]] = []
        for one, rows in zip(groups.placed, given.split(sizes), strict=True):
            above += _group_backward(qkv, grad, one, rows, heads)
        flat = given.index_select(0, groups.qkv)
        for at, part in above:  # only now has every token got its own
            flat.index_add_(0, at, part.to(flat.dtype))
        d_qkv = flat.view_as(qkv)
        return d_qkv if cos is None else _turn(d_qkv, cos, sin, heads, back=True), None, None, None, None


def _group_forward(qkv: Tensor, one: Placed, into: Tensor, heads: Heads) -> None:
    """What a group gives to the output, rows in its order."""
    into = into.view(one.batch, -1, heads.size)
    for part in _parts(one, heads):
        q, k, v = _queries_keys_values(qkv, one, part, heads)
        made = _made_like(q, "attended")
        for block in _blocks(one, heads):
            made[:, block.rows] = torch.bmm(_weights(q, k, block, heads.window), v[:, block.keys])
        into[part] = made


def _group_backward(qkv: Tensor, grad: Tensor, one: Placed, into: Tensor, heads: Heads) -> list[tuple[Tensor, Tensor]]:
    """What a group gives to the gradient of qkv: its queries', then its own tokens' keys' and values'.

    What the padding gives is zero or of no account.

    Returns:
        rows of qkv with the keys and with the values of the tokens above, and what is to be added to these.
    """
    own = [part.view(one.batch, -1, heads.size) for part in into.split([one.q.numel(), *[one.batch * one.length] * 2])]
    above = [into.new_zeros(heads.kv_heads, one.before, heads.size, dtype=work_dtype(qkv)) for _ in ("k", "v")]
    for part in _parts(one, heads):
        q, k, v = _queries_keys_values(qkv, one, part, heads)
        d_out = _gathered(grad, one.out[part], heads, "gradient of attended")
        if one.padded is not None:
            d_out.view(*one.padded[part].shape[:2], -1, heads.size).masked_fill_(one.padded[part], 0)
        d_q, d_k, d_v = _made_like(q, "d_q"), _made_like(k, "d_k").zero_(), _made_like(v, "d_v").zero_()
        for block in _blocks(one, heads):
            _block_backward((q, k, v, d_out), (d_q, d_k, d_v), block, heads.window)
        own[0][part] = d_q.mul_(heads.scaling)
        head = torch.arange(part.start, part.stop, device=q.device) % heads.kv_heads
        for made, mine, total in zip((d_k, d_v), own[1:], above, strict=True):
            mine[part] = made[:, one.before :]
            total.index_add_(0, head, made[:, : one.before])
    return [(at, total.flatten(0, 1)) for at, total in zip((one.above_k, one.above_v), above, strict=True)]


@dataclass(frozen=True)
class _Block:
    """Queries of each key head in each segment, and the `keys` of its context that they may see.

    Attributes:
        tokens: how many.
        rows: of the queries, heads that share the key side by side.
        seen: keys that the first token sees; each next one sees one more.
    """

    tokens: int
    rows: slice
    keys: slice
    seen: int


def _blocks(one: Placed, heads: Heads) -> Iterator[_Block]:
    """From the last to the first: the last one's keys are all of them, unless there is a window."""
    for start in reversed(range(0, one.length, BLOCK)):
        stop = min(start + BLOCK, one.length)
        first = one.before + start  # the first query's own place in its context
        low = 0 if heads.window is None else max(0, first - heads.window + 1)
        rows = slice(start * heads.shared, stop * heads.shared)
        yield _Block(stop - start, rows, slice(low, one.before + stop), first + 1 - low)


def _parts(one: Placed, heads: Heads) -> Iterator[slice]:
    """Key heads whose scores of a block fit the processor's cache together, of one segment or of several."""
    keys = min(one.before + one.length, (heads.window or sys.maxsize) + BLOCK)
    most = max(1, SCORES // (heads.shared * min(BLOCK, one.length) * keys))
    for start in range(0, one.batch, most):
        yield slice(start, min(start + most, one.batch))


def _queries_keys_values(qkv: Tensor, one: Placed, part: slice, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Some of a group's key heads: scaled queries (batch, tokens · heads sharing a key, size), keys and values."""
    q, k, v = (_gathered(qkv, at[part], heads, use) for at, use in ((one.q, "q"), (one.k, "k"), (one.v, "v")))
    return q.mul_(heads.scaling), k, v


def _gathered(states: Tensor, at: Tensor, heads: Heads, use: str) -> Tensor:
    """Rows `at` of (…, size) states in the dtype in which products are fastest, good until the next of that use."""
    found = states.reshape(-1, heads.size).index_select(0, at.flatten())
    return widened(found, work_dtype(states), use).view(len(at), -1, heads.size)


def _made_like(x: Tensor, use: str) -> Tensor:
    """Uninitialised, good until the next of that use."""
    return scratch(use, x.shape[0] * x.shape[1], x.shape[2], x.dtype, x.device).view_as(x)


def _weights(q: Tensor, k: Tensor, block: _Block, window: int | None) -> Tensor:
    """Softmax of a block's scores: (batch, queries · heads sharing a key, keys)."""
    scores = torch.bmm(q[:, block.rows], k[:, block.keys].mT)
    _hide(scores.view(len(q), block.tokens, -1, scores.shape[2]), block, window)
    return torch.softmax(scores, dim=-1)


def _hide(scores: Tensor, block: _Block, window: int | None) -> None:
    """Minus infinity where a query must not look: after itself, and before its window."""
    queries, keys = scores.shape[1], scores.shape[3]
    after, before = _corners(queries, scores.dtype, scores.device)
    scores[..., block.seen - 1 :] += after
    if window is not None and keys > window:
        spare = window - block.seen  # queries besides the first that see the first key
        scores[..., : queries - 1 - spare] += before[..., spare:]


@functools.lru_cache(maxsize=256)
def _corners(queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Minus infinity above the diagonal, and below it, zero elsewhere; adding is faster than filling by a mask.

    Shapes (queries, 1, queries) and (queries, 1, queries - 1).
    """
    full = torch.full((queries, queries), float("-inf"), dtype=dtype, device=device)
    return full.triu(1)[:, None], full.tril(-1)[:, None, :-1]


def _block_backward(given: tuple[Tensor, ...], grads: tuple[Tensor, ...], block: _Block, window: int | None) -> None:
    """A block's part of the gradients, added to keys' and values', written to scaled queries'."""
    (q, k, v, d_out), (d_q, d_k, d_v) = given, grads
    weights, d_rows = _weights(q, k, block, window), d_out[:, block.rows]
    d_v[:, block.keys] += torch.bmm(weights.mT, d_rows)
    d_weights = torch.bmm(d_rows, v[:, block.keys].mT)
    # dS = P ∘ (dP − rowsum(dP ∘ P))
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_k[:, block.keys] += torch.bmm(d_scores.mT, q[:, block.rows])
    d_q[:, block.rows] = torch.bmm(d_scores, k[:, block.keys])
