"""Causal attention over packed segments by matrix products, with its own backward.

Segments of like length are computed together. A block of queries sees a prefix of its segment's context, so each
block is one product, one softmax over whole rows and another product; nothing is computed above the diagonal but the
block's own corner, and memory grows with the length, not with its square. Query heads that share a key head
(grouped-query attention) are stacked as rows. The backward computes the softmax again from queries and keys (Dao et
al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.ops.layout import Group, Segment, group
from phinetune.ops.rotary import rotate_
from phinetune.products import work_dtype

BLOCK = 64
SCORES = 1 << 20
FLASH_FROM = 1024  # tokens, on a CPU in float32; benchmarks/attention.py measures both


@dataclass(frozen=True)
class Heads:
    """How a row of qkv (heads + 2 · kv_heads) · size is cut, and how attention weighs and limits.

    Attributes:
        window: keys that a query sees, itself included; None is all before it.
    """

    heads: int
    kv_heads: int
    size: int
    scaling: float
    window: int | None = None

    @property
    def shared(self) -> int:
        """Query heads a key head."""
        return self.heads // self.kv_heads

    @property
    def total(self) -> int:
        return self.heads + 2 * self.kv_heads


@dataclass(frozen=True)
class Placed:
    """A group, and where its heads lie: rows of qkv, of the output and of their gradients, seen as (rows, size).

    Heads are laid out as (segments, kv_heads, tokens, heads sharing the key). What the padding gives is written to a
    token behind the last.

    Attributes:
        batch: segments · kv_heads.
        length: own tokens of the longest segment.
        before: tokens above.
        q, k, v, out: where to read; `to_` where to write, keys and values of the segments' own tokens only.
        above_k, above_v: keys and values of the tokens above, of every head.
        padded: own tokens that are padding, shape (segments, 1, length, 1, 1); None where none is.
    """

    batch: int
    length: int
    before: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    to_q: Tensor
    to_k: Tensor
    to_v: Tensor
    to_out: Tensor
    above_k: Tensor
    above_v: Tensor
    padded: Tensor | None


@dataclass(frozen=True)
class Run:
    """Tokens of the row next to each other that are computed in one way.

    Attributes:
        groups: of their segments, counted from the run's first token; None: one long root, which goes to torch's
            fused attention.
    """

    length: int
    groups: list[Placed] | None


def plan(segments: Sequence[Segment], heads: Heads, dtype: torch.dtype, device: torch.device) -> list[Run]:
    """How to attend within segments; the same for every layer.

    Args:
        segments: cover the row in order; a branch stands after its parent and before the next root.
    """
    runs: list[list[Segment]] = []
    fused: list[bool] = []
    for i, segment in enumerate(segments):
        branches = i + 1 < len(segments) and bool(segments[i + 1].above)
        # The fused attention knows neither branches nor a window.
        simple = not segment.above and not branches and len(segment) <= (heads.window or len(segment))
        alone = simple and len(segment) > _fused_from(dtype, device)
        if alone or not runs or fused[-1]:
            runs.append([])
            fused.append(alone)
        runs[-1].append(segment)
    return [_run(run, heads, device, alone) for run, alone in zip(runs, fused, strict=True)]


def _run(segments: Sequence[Segment], heads: Heads, device: torch.device, alone: bool) -> Run:
    first, length = segments[0].start, segments[-1].stop - segments[0].start
    if alone:
        return Run(length, None)
    groups = group([s.moved(-first) for s in segments], device)
    return Run(length, [_placed(part, heads, length) for one in groups for part in _portions(one, heads)])


def _portions(one: Group, heads: Heads) -> Iterator[Group]:
    """A group cut so that a block's scores stay in the processor's cache."""
    most = max(1, SCORES // (heads.kv_heads * _scores(one.before, one.own.shape[1], heads)))
    for start in range(0, len(one.own), most):
        part = slice(start, start + most)
        yield Group(one.above, one.own[part], None if one.there is None else one.there[part])


def _placed(one: Group, heads: Heads, tokens: int) -> Placed:
    own, above = one.own, torch.cat([torch.arange(*part) for part in one.above] or [torch.empty(0, dtype=torch.long)])
    above = above.to(own.device)[None]
    to = own if one.there is None else own.where(one.there, tokens)
    context = torch.cat([above.expand(len(own), -1), own], dim=1)

    def queries(at: Tensor, total: int) -> Tensor:
        head = torch.arange(heads.heads, device=at.device).view(heads.kv_heads, 1, -1)
        return (at[:, None, :, None] * total + head).flatten()

    def keys(at: Tensor, first: int) -> Tensor:
        head = torch.arange(first, first + heads.kv_heads, device=at.device)[:, None]
        return (at[:, None] * heads.total + head).flatten()

    k, v = heads.heads, heads.heads + heads.kv_heads
    return Placed(
        batch=len(own) * heads.kv_heads,
        length=own.shape[1],
        before=above.shape[1],
        q=queries(own, heads.total),
        k=keys(context, k),
        v=keys(context, v),
        out=queries(own, heads.heads),
        to_q=queries(to, heads.total),
        to_k=keys(to, k),
        to_v=keys(to, v),
        to_out=queries(to, heads.heads),
        above_k=keys(above, k),
        above_v=keys(above, v),
        padded=None if one.there is None else ~one.there[:, None, :, None, None],
    )


def _fused_from(dtype: torch.dtype, device: torch.device) -> float:
    """Length from which torch's fused attention wins. On a CPU its bfloat16 backward never does."""
    if device.type != "cpu":
        return 0
    return FLASH_FROM if dtype == torch.float32 else math.inf


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[Run], heads: Heads) -> Tensor:
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


def _attend(qkv: Tensor, run: Run, heads: Heads) -> Tensor:
    """A run's tokens, already rotated."""
    return _fused(qkv, heads) if run.groups is None else _in_groups(qkv, None, None, run.groups, heads)


def _in_groups(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: list[Placed], heads: Heads) -> Tensor:
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
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Sequence[Placed], heads: Heads
    ) -> Tensor:
        if cos is not None and sin is not None:
            _turn(qkv, cos, sin, heads)
        out = qkv.new_empty(len(qkv) + 1, heads.heads * heads.size)
        for one in groups:
            q, k, v = _gather(qkv, one, heads)
            rows = torch.empty_like(q)
            for part in _parts(one, heads):
                for block in _blocks(one, heads.window):
                    got = torch.bmm(_weights(q[part], k[part], block, heads), v[part, block.keys])
                    rows[part, block.queries] = got.view(len(got), -1, heads.shared, heads.size)
            out.view(-1, heads.size).index_copy_(0, one.to_out, rows.view(-1, heads.size).to(out.dtype))
        ctx.groups, ctx.heads = groups, heads
        ctx.save_for_backward(qkv, cos, sin)
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        heads: Heads = ctx.heads
        d_qkv = qkv.new_empty(len(qkv) + 1, qkv.shape[1])
        flat = d_qkv.view(-1, heads.size)
        shared: list[tuple[Tensor, Tensor]] = []
        for one in ctx.groups:
            d_q, d_k, d_v = _group_backward(qkv, grad, one, heads)
            flat.index_copy_(0, one.to_q, d_q.view(-1, heads.size).to(flat.dtype))
            for to, above, part in ((one.to_k, one.above_k, d_k), (one.to_v, one.above_v, d_v)):
                flat.index_copy_(0, to, part[:, one.before :].reshape(-1, heads.size).to(flat.dtype))
                summed = part[:, : one.before].unflatten(0, (-1, heads.kv_heads)).sum(0)
                shared.append((above, summed.view(-1, heads.size).to(flat.dtype)))
        for above, part in shared:  # only now has every token got its own
            flat.index_add_(0, above, part)
        d_qkv = d_qkv[:-1]
        return d_qkv if cos is None else _turn(d_qkv, cos, sin, heads, back=True), None, None, None, None


@dataclass(frozen=True)
class _Block:
    """Own tokens `queries` of each segment, and the tokens `keys` of its context that they may see.

    The first query sees `seen` of these keys, each next one sees one more.
    """

    queries: slice
    keys: slice
    seen: int


def _blocks(one: Placed, window: int | None) -> Iterator[_Block]:
    """From the last to the first: the last one's keys are all of them, unless there is a window."""
    for start in reversed(range(0, one.length, BLOCK)):
        stop = min(start + BLOCK, one.length)
        first = one.before + start  # the first query's own place in its context
        low = 0 if window is None else max(0, first - window + 1)
        yield _Block(slice(start, stop), slice(low, one.before + stop), first + 1 - low)


def _parts(one: Placed, heads: Heads) -> Iterator[slice]:
    """Heads whose scores of a block fit the processor's cache together."""
    most = max(1, SCORES // _scores(one.before, one.length, heads))
    for start in range(0, one.batch, most):
        yield slice(start, start + most)


def _scores(before: int, length: int, heads: Heads) -> int:
    """Elements of a block's scores, of one key head in one segment: those before its window are not computed."""
    keys = min(before + length, (heads.window or sys.maxsize) + BLOCK)
    return heads.shared * min(BLOCK, length) * keys


def _gather(qkv: Tensor, one: Placed, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries (batch, tokens, heads sharing a key, size), keys and values (batch, context, size).

    In the dtype in which products are fastest.
    """
    flat, work = qkv.view(-1, heads.size), work_dtype(qkv)
    q, k, v = (flat.index_select(0, at).to(work) for at in (one.q, one.k, one.v))
    shape = (one.batch, -1, heads.size)
    return q.view(one.batch, one.length, heads.shared, heads.size), k.view(shape), v.view(shape)


def _weights(q: Tensor, k: Tensor, block: _Block, heads: Heads) -> Tensor:
    """Softmax of a block's scaled scores: (batch, queries · heads sharing a key, keys)."""
    rows, keys = q[:, block.queries].flatten(1, 2), k[:, block.keys]
    scores = torch.baddbmm(rows[:, :1, :1], rows, keys.mT, beta=0, alpha=heads.scaling)
    _hide(scores.view(len(q), -1, heads.shared, keys.shape[1]), block, heads.window)
    return torch.softmax(scores, dim=-1)


def _hide(scores: Tensor, block: _Block, window: int | None) -> None:
    """Minus infinity where a query must not look: after itself, and before its window."""
    queries, keys = scores.shape[1], scores.shape[3]
    scores[..., block.seen - 1 :] += _corner(queries, scores.dtype, scores.device)
    if window is not None and keys > window:
        row = torch.arange(queries, device=scores.device)[:, None, None]
        column = torch.arange(keys, device=scores.device)
        scores.masked_fill_(column <= row + (block.seen - 1 - window), float("-inf"))


@functools.lru_cache(maxsize=256)
def _corner(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity above the diagonal, zero elsewhere; adding it is faster than filling by a mask."""
    return torch.full((queries, queries), float("-inf"), dtype=dtype, device=device).triu_(1)[:, None]


def _group_backward(qkv: Tensor, grad: Tensor, one: Placed, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what `_gather` gave; those of the padding are zero or of no account."""
    q, k, v = _gather(qkv, one, heads)
    d_out = grad.reshape(-1, heads.size).index_select(0, one.out).view_as(q).to(q.dtype)
    if one.padded is not None:
        d_out.unflatten(0, (-1, heads.kv_heads)).masked_fill_(one.padded, 0)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _parts(one, heads):
        given = (q[part], k[part], v[part], d_out[part])
        for block in _blocks(one, heads.window):
            _block_backward(given, (d_q[part], d_k[part], d_v[part]), block, heads)
    return d_q, d_k, d_v


def _block_backward(given: tuple[Tensor, ...], grads: tuple[Tensor, ...], block: _Block, heads: Heads) -> None:
    """A block's part of the gradients, added to keys' and values', written to queries'."""
    (q, k, v, d_out), (d_q, d_k, d_v) = given, grads
    weights, d_rows = _weights(q, k, block, heads), d_out[:, block.queries].flatten(1, 2)
    d_v[:, block.keys] += torch.bmm(weights.mT, d_rows)
    d_weights = torch.bmm(d_rows, v[:, block.keys].mT)
    # dS = P ∘ (dP − rowsum(dP ∘ P))
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(heads.scaling)
    d_k[:, block.keys] += torch.bmm(d_scores.mT, q[:, block.queries].flatten(1, 2))
    d_q[:, block.queries] = torch.bmm(d_scores, k[:, block.keys]).view_as(d_q[:, block.queries])
