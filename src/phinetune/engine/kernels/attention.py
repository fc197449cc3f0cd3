"""Causal attention over packed segments by matrix products, with its own backward.

Segments of similar length are computed together, as a group. A block of queries sees a prefix of its segment's
context. So each block needs one product, one softmax over whole rows and another product. Above the diagonal, only
the scores within the block itself are computed. Memory grows with the length, not with its square. Query heads that
share a key head (grouped-query attention) are stacked as rows. The backward computes the softmax again from queries
and keys (Dao et al. 2022, FlashAttention, section 3.1).
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

from phinetune.engine.attention_plan import AttentionRun, GroupRows, Groups, Heads
from phinetune.engine.kernels.matmul import converted, product_dtype, scratch
from phinetune.engine.kernels.rotary import rotate_

BLOCK_QUERIES = 64  # queries of a segment whose scores are computed at a time
MAX_SCORES = 1 << 20  # scores held at a time; several heads are computed together if all their scores fit


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[AttentionRun], heads: Heads) -> Tensor:
    """Rotate queries and keys, then attend within segments.

    Args:
        qkv: the output of the fused projection, shape (tokens, (heads + 2 · kv_heads) · size). It is overwritten.
        cos, sin: shape (tokens, m), for the first 2·m features of each head.
        runs: what `attention_plan.plan` returns. The runs cover the tokens in order.

    Returns:
        shape (tokens, heads · size).
    """
    if len(runs) == 1 and runs[0].groups is not None:
        return _grouped(qkv, cos, sin, runs[0].groups, heads)
    qkv = _Rotate.apply(qkv, cos, sin, heads)  # type: ignore[no-untyped-call]
    parts = qkv.split([run.length for run in runs])
    return torch.cat([_attend(part, run, heads) for part, run in zip(parts, runs, strict=True)])


def _attend(qkv: Tensor, run: AttentionRun, heads: Heads) -> Tensor:
    """The output for a run's tokens. Queries and keys in `qkv` are rotated already."""
    return _fused(qkv, heads) if run.groups is None else _grouped(qkv, None, None, run.groups, heads)


def _grouped(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Groups, heads: Heads) -> Tensor:
    out: Tensor = _Attention.apply(qkv, cos, sin, groups, heads)  # type: ignore[no-untyped-call]
    return out


def _fused(qkv: Tensor, heads: Heads) -> Tensor:
    """The output for one segment, by torch's fused attention."""
    q, k, v = (part.transpose(0, 1)[None] for part in _split(qkv, heads))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scaling, enable_gqa=heads.shared > 1)
    return out[0].transpose(0, 1).reshape(len(qkv), -1)


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries (tokens, heads, size), keys and values (tokens, kv_heads, size)."""
    q, k, v = qkv.view(len(qkv), -1, heads.size).split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    return q, k, v


def _rotate_qk(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, *, back: bool = False) -> Tensor:
    """Rotate the queries and keys in `qkv` in place. `back` applies the transposed rotation."""
    states = qkv.view(len(qkv), -1, heads.size)[:, : heads.heads + heads.kv_heads]
    rotate_(states, cos, sin, back=back)
    return qkv


class _Rotate(torch.autograd.Function):
    """Rotates queries and keys in place. Keeps cos and sin for the backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
        _rotate_qk(qkv, cos, sin, heads)
        ctx.mark_dirty(qkv)
        ctx.heads = heads
        ctx.save_for_backward(cos, sin)
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_qk(grad.clone(), cos, sin, ctx.heads, back=True), None, None, None


class _Attention(torch.autograd.Function):
    """Attention over groups of segments. First rotates qkv in place, if cos and sin are given.

    Keeps the rotated qkv, cos and sin for the backward.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Groups, heads: Heads) -> Tensor:
        if cos is not None and sin is not None:
            _rotate_qk(qkv, cos, sin, heads)
        sizes = [group.out.numel() for group in groups.members]
        grouped = qkv.new_empty(sum(sizes), heads.size)
        for group, rows in zip(groups.members, grouped.split(sizes), strict=True):
            _group_forward(qkv, group, rows, heads)
        ctx.groups, ctx.heads = groups, heads
        ctx.save_for_backward(qkv, cos, sin)
        return grouped.index_select(0, groups.out).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        groups: Groups = ctx.groups
        heads: Heads = ctx.heads
        sizes = [group.q.numel() + 2 * group.batch * group.length for group in groups.members]
        grouped = qkv.new_empty(sum(sizes), heads.size)
        above: list[tuple[Tensor, Tensor]] = []
        for group, rows in zip(groups.members, grouped.split(sizes), strict=True):
            above += _group_backward(qkv, grad, group, rows, heads)
        flat = grouped.index_select(0, groups.qkv)
        # The gradients from branches are added last: now every token has the gradient from its own segment.
        for at, from_branches in above:
            flat.index_add_(0, at, from_branches.to(flat.dtype))
        d_qkv = flat.view_as(qkv)
        return d_qkv if cos is None else _rotate_qk(d_qkv, cos, sin, heads, back=True), None, None, None, None


def _group_forward(qkv: Tensor, group: GroupRows, into: Tensor, heads: Heads) -> None:
    """Write a group's output to `into`, shape (rows, size), in the order of the group's `out`."""
    into = into.view(group.batch, -1, heads.size)
    for chunk in _key_head_chunks(group, heads):
        q, k, v = _queries_keys_values(qkv, group, chunk, heads)
        out = _scratch_like(q, "out")
        for block in _blocks(group, heads):
            out[:, block.rows] = torch.bmm(_weights(q, k, block, heads.window), v[:, block.keys])
        into[chunk] = out


def _group_backward(
    qkv: Tensor, grad: Tensor, group: GroupRows, into: Tensor, heads: Heads
) -> list[tuple[Tensor, Tensor]]:
    """Write a group's gradient of qkv to `into`, shape (rows, size): queries, then keys and values of its own tokens.

    The gradient from padding is zero, or lies in rows that are never read.

    Returns:
        For the keys, then for the values of the tokens above: their rows in qkv, and the gradient to add there.
    """
    sizes = [group.q.numel(), *[group.batch * group.length] * 2]
    own = [rows.view(group.batch, -1, heads.size) for rows in into.split(sizes)]
    above = [into.new_zeros(heads.kv_heads, group.before, heads.size, dtype=product_dtype(qkv)) for _ in ("k", "v")]
    for chunk in _key_head_chunks(group, heads):
        q, k, v = _queries_keys_values(qkv, group, chunk, heads)
        d_out = _gather(grad, group.out[chunk], heads, "d_out")
        if group.padded is not None:
            d_out.view(*group.padded[chunk].shape[:2], -1, heads.size).masked_fill_(group.padded[chunk], 0)
        d_q, d_k, d_v = _scratch_like(q, "d_q"), _scratch_like(k, "d_k").zero_(), _scratch_like(v, "d_v").zero_()
        for block in _blocks(group, heads):
            _block_backward((q, k, v, d_out), (d_q, d_k, d_v), block, heads.window)
        own[0][chunk] = d_q.mul_(heads.scaling)
        head = torch.arange(chunk.start, chunk.stop, device=q.device) % heads.kv_heads
        for found, own_rows, total in zip((d_k, d_v), own[1:], above, strict=True):
            own_rows[chunk] = found[:, group.before :]
            total.index_add_(0, head, found[:, : group.before])
    return [(at, total.flatten(0, 1)) for at, total in zip((group.above_k, group.above_v), above, strict=True)]


@dataclass(frozen=True)
class _Block:
    """A block of neighbouring queries, the same for each key head and each segment of a group.

    Attributes:
        tokens: how many tokens the queries belong to.
        rows: the queries' rows. A token has one row for each query head that shares the key head.
        keys: the keys of the context that at least one of the queries sees.
        seen: how many of `keys` the first token sees. Each next token sees one more.
    """

    tokens: int
    rows: slice
    keys: slice
    seen: int


def _blocks(group: GroupRows, heads: Heads) -> Iterator[_Block]:
    """The blocks of a group, from the last to the first. Without a window, the last block sees all keys."""
    for start in reversed(range(0, group.length, BLOCK_QUERIES)):
        stop = min(start + BLOCK_QUERIES, group.length)
        first = group.before + start  # the place of the first query's token in its context
        low = 0 if heads.window is None else max(0, first - heads.window + 1)
        rows = slice(start * heads.shared, stop * heads.shared)
        yield _Block(stop - start, rows, slice(low, group.before + stop), first + 1 - low)


def _key_head_chunks(group: GroupRows, heads: Heads) -> Iterator[slice]:
    """Slices of a group's segments · kv_heads, so small that one block's scores fit the processor's cache.

    A slice holds at least one key head. It can hold key heads of several segments.
    """
    keys = min(group.before + group.length, (heads.window or sys.maxsize) + BLOCK_QUERIES)
    most = max(1, MAX_SCORES // (heads.shared * min(BLOCK_QUERIES, group.length) * keys))
    for start in range(0, group.batch, most):
        yield slice(start, min(start + most, group.batch))


def _queries_keys_values(qkv: Tensor, group: GroupRows, chunk: slice, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries, keys and values of some key heads of a group.

    Returns:
        queries of shape (batch, tokens · heads sharing a key, size), keys and values of shape (batch, keys, size).
    """
    q, k, v = (_gather(qkv, at[chunk], heads, use) for at, use in ((group.q, "q"), (group.k, "k"), (group.v, "v")))
    return q.mul_(heads.scaling), k, v


def _gather(states: Tensor, at: Tensor, heads: Heads, use: str) -> Tensor:
    """The rows `at` of `states`, seen as (rows, size), in the dtype in which products are fastest.

    Valid until the next call for the same use.
    """
    found = states.reshape(-1, heads.size).index_select(0, at.flatten())
    return converted(found, product_dtype(states), use).view(len(at), -1, heads.size)


def _scratch_like(x: Tensor, use: str) -> Tensor:
    """An uninitialised tensor of x's shape and dtype. Valid until the next call for the same use."""
    return scratch(use, x.shape[0] * x.shape[1], x.shape[2], x.dtype, x.device).view_as(x)


def _weights(q: Tensor, k: Tensor, block: _Block, window: int | None) -> Tensor:
    """The attention weights of a block, shape (batch, tokens · heads sharing a key, keys)."""
    scores = torch.bmm(q[:, block.rows], k[:, block.keys].mT)
    _mask(scores.view(len(q), block.tokens, -1, scores.shape[2]), block, window)
    return torch.softmax(scores, dim=-1)


def _mask(scores: Tensor, block: _Block, window: int | None) -> None:
    """Set scores to minus infinity where a query must not see a key: after its own token, and before its window.

    Args:
        scores: shape (batch, tokens, heads sharing a key, keys). They are changed in place.
    """
    queries, keys = scores.shape[1], scores.shape[3]
    after, before = _triangles(queries, scores.dtype, scores.device)
    scores[..., block.seen - 1 :] += after
    if window is not None and keys > window:
        spare = window - block.seen  # how many queries after the first also see the first key
        scores[..., : queries - 1 - spare] += before[..., spare:]


@functools.lru_cache(maxsize=256)
def _triangles(queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two masks to add to scores. Adding a mask is faster than filling by a boolean mask.

    Returns:
        minus infinity above the diagonal and zero elsewhere, shape (queries, 1, queries); minus infinity below the
        diagonal and zero elsewhere, shape (queries, 1, queries - 1).
    """
    full = torch.full((queries, queries), float("-inf"), dtype=dtype, device=device)
    return full.triu(1)[:, None], full.tril(-1)[:, None, :-1]


def _block_backward(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], block: _Block, window: int | None) -> None:
    """Add a block's gradients to those of keys and values, and write those of the scaled queries.

    Args:
        inputs: q, k, v and the gradient of the output.
        grads: the gradients of q, k and v, changed in place.
    """
    (q, k, v, d_out), (d_q, d_k, d_v) = inputs, grads
    weights, d_rows = _weights(q, k, block, window), d_out[:, block.rows]
    d_v[:, block.keys] += torch.bmm(weights.mT, d_rows)
    d_weights = torch.bmm(d_rows, v[:, block.keys].mT)
    # dS = P ∘ (dP − rowsum(dP ∘ P))
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_k[:, block.keys] += torch.bmm(d_scores.mT, q[:, block.rows])
    d_q[:, block.rows] = torch.bmm(d_scores, k[:, block.keys])
