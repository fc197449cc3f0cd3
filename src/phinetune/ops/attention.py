"""Causal attention over packed segments by matrix products, with its own backward.

A block of queries sees a prefix of its segment's context, so each block is one product, one softmax over whole
rows and another product; nothing is computed above the diagonal but the block's own corner, and memory grows with
the length, not with its square. Query heads that share a key head (grouped-query attention) are stacked as rows.
The backward computes the softmax again from queries and keys (Dao et al. 2022, FlashAttention, section 3.1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phinetune.ops.layout import Range, Segment
from phinetune.ops.rotary import rotate_

BLOCK = 64  # queries a product
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
    def group(self) -> int:
        return self.heads // self.kv_heads


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[Segment], heads: Heads) -> Tensor:
    """Rotate queries and keys, attend within segments.

    Args:
        qkv: the fused projection's output, shape (tokens, (heads + 2 · kv_heads) · size); overwritten.
        cos, sin: shape (tokens, m) for the first 2·m features of each head.
        segments: cover the row in order; a branch stands after its parent and before the next root.

    Returns:
        shape (tokens, heads · size).
    """
    runs = list(_runs(segments, heads, _flash_from(qkv)))
    if len(runs) == 1 and not isinstance(runs[0], Segment):
        return _in_blocks(qkv, cos, sin, segments, heads)
    qkv = _Rotate.apply(qkv, cos, sin, heads)  # type: ignore[no-untyped-call]
    parts = qkv.split([_length(run) for run in runs])
    return torch.cat([_attend(part, run, heads) for part, run in zip(parts, runs, strict=True)])


def _in_blocks(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, segments: Sequence[Segment], heads: Heads
) -> Tensor:
    out: Tensor = _Attention.apply(qkv, cos, sin, segments, heads)  # type: ignore[no-untyped-call]
    return out


def _attend(qkv: Tensor, run: Segment | Sequence[Segment], heads: Heads) -> Tensor:
    """A run's tokens, already rotated: a long root by torch's fused attention, others in blocks."""
    if not isinstance(run, Segment):
        return _in_blocks(qkv, None, None, [segment.moved(-run[0].start) for segment in run], heads)
    q, k, v = (part.transpose(0, 1)[None] for part in _split(qkv, heads))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scaling, enable_gqa=heads.group > 1)
    return out[0].transpose(0, 1).reshape(len(qkv), -1)


def _flash_from(qkv: Tensor) -> float:
    """Roots longer than this go to torch's fused attention; benchmarks/attention.py measures where it wins.

    On a CPU its bfloat16 backward is slower than the products at any length.
    """
    if qkv.device.type != "cpu":
        return 0
    return FLASH_FROM if qkv.dtype == torch.float32 else math.inf


def _runs(segments: Sequence[Segment], heads: Heads, flash_from: float) -> list[Segment | list[Segment]]:
    """The row cut into long roots, alone, and lists of what lies between them.

    A root stays in a list if it has branches, or a window that it is too long for: the fused attention has neither.
    """
    runs: list[Segment | list[Segment]] = []
    for i, segment in enumerate(segments):
        length = segment.stop - segment.start
        branches = i + 1 < len(segments) and bool(segments[i + 1].above)
        plain = not segment.above and not branches and length <= (heads.window or length)
        if plain and length > flash_from:
            runs.append(segment)
        elif runs and isinstance(runs[-1], list):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _length(run: Segment | list[Segment]) -> int:
    first, last = (run, run) if isinstance(run, Segment) else (run[0], run[-1])
    return last.stop - first.start


class _Rotate(torch.autograd.Function):
    """Rotates queries and keys of qkv in place."""

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


def _turn(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, *, back: bool = False) -> Tensor:
    q, k, _ = _split(qkv, heads)
    rotate_(q, cos, sin, back=back)
    rotate_(k, cos, sin, back=back)
    return qkv


class _Attention(torch.autograd.Function):
    """Rotates in place first where cos and sin are given. Keeps the rotated qkv alone."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, segments: Sequence[Segment], heads: Heads
    ) -> Tensor:
        if cos is not None and sin is not None:
            _turn(qkv, cos, sin, heads)
        q, k, v = _split(qkv, heads)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for segment in segments:
            keys, values = _gather(k, segment.ranges), _gather(v, segment.ranges)
            for block in _blocks(segment, heads.window):
                weights = _weights(q, keys, block, heads)
                _product(weights, values[:, block.low : block.high], 1.0, out, block, heads)
        ctx.segments, ctx.heads = segments, heads
        ctx.save_for_backward(qkv, cos, sin)
        return out.view(len(out), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        d_qkv = torch.zeros_like(qkv)
        d_q, d_k, d_v = _split(d_qkv, ctx.heads)
        q, k, v = _split(qkv, ctx.heads)
        grad = grad.reshape(q.shape)
        for segment in ctx.segments:
            keys, values = _gather(k, segment.ranges), _gather(v, segment.ranges)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for block in _blocks(segment, ctx.heads.window):
                _block_backward(q, keys, values, grad, d_q, d_keys, d_values, block, ctx.heads)
            _scatter(d_k, segment.ranges, d_keys)
            _scatter(d_v, segment.ranges, d_values)
        if cos is not None:
            _turn(d_qkv, cos, sin, ctx.heads, back=True)
        return d_qkv, None, None, None, None


@dataclass(frozen=True)
class _Block:
    """Queries [start, stop) of the row and the keys [low, high) of their context that they may see.

    `seen` of these keys are seen by the first query; each next one sees one more.
    """

    start: int
    stop: int
    low: int
    high: int
    seen: int


def _blocks(segment: Segment, window: int | None) -> Iterator[_Block]:
    before = sum(stop - start for start, stop in segment.above)
    for start in range(segment.start, segment.stop, BLOCK):
        stop = min(start + BLOCK, segment.stop)
        first = before + start - segment.start  # the first query's own place in its context
        low = 0 if window is None else max(0, first - window + 1)
        yield _Block(start, stop, low, first + stop - start, first + 1 - low)


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of queries (tokens, heads, size), keys and values (tokens, kv_heads, size)."""
    parts = qkv.view(len(qkv), -1, heads.size)
    q, k, v = parts.split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    return q, k, v


def _gather(states: Tensor, ranges: Sequence[Range]) -> Tensor:
    """The tokens of `ranges`, head by head: (kv_heads, tokens, size)."""
    if len(ranges) == 1:
        return states[ranges[0][0] : ranges[0][1]].transpose(0, 1).contiguous()
    return torch.cat([states[start:stop].transpose(0, 1) for start, stop in ranges], dim=1)


def _scatter(into: Tensor, ranges: Sequence[Range], grad: Tensor) -> None:
    """Add what `_gather` took, (kv_heads, tokens, size), back to where it lay."""
    for (start, stop), part in zip(ranges, grad.split([stop - start for start, stop in ranges], dim=1), strict=True):
        into[start:stop].add_(part.transpose(0, 1))


def _take(states: Tensor, block: _Block, heads: Heads) -> Tensor:
    """Query rows of a block: (kv_heads, group · queries, size)."""
    part = states[block.start : block.stop].unflatten(1, (heads.kv_heads, heads.group))
    rows: Tensor = part.permute(1, 2, 0, 3).reshape(heads.kv_heads, -1, heads.size)
    return rows


def _product(left: Tensor, right: Tensor, scaling: float, into: Tensor, block: _Block, heads: Heads) -> None:
    """scaling · left right, (kv_heads, group · queries, size), to where `_take` takes a block's rows from."""
    if heads.group == 1:
        rows = into[block.start : block.stop].transpose(0, 1)
        torch.baddbmm(rows, left, right, beta=0, alpha=scaling, out=rows)
        return
    part = into[block.start : block.stop].unflatten(1, (heads.kv_heads, heads.group))
    rows = torch.baddbmm(right[:, :1], left, right, beta=0, alpha=scaling)
    part.copy_(rows.view(heads.kv_heads, heads.group, -1, heads.size).permute(2, 0, 1, 3))


def _weights(q: Tensor, keys: Tensor, block: _Block, heads: Heads) -> Tensor:
    """Softmax of the scaled scores: (kv_heads, group · queries, keys)."""
    rows = _take(q, block, heads)
    scores = rows.new_empty(heads.kv_heads, rows.shape[1], block.high - block.low)
    torch.baddbmm(scores, rows, keys[:, block.low : block.high].mT, beta=0, alpha=heads.scaling, out=scores)
    _hide(scores, block, heads.window)
    return torch.softmax(scores, dim=-1)


def _hide(scores: Tensor, block: _Block, window: int | None) -> None:
    """Minus infinity where a query must not look: after itself, and before its window."""
    queries = block.stop - block.start
    shaped = scores.view(len(scores), -1, queries, scores.shape[-1])
    shaped[..., block.seen - 1 :].add_(_corner(queries, scores.dtype, scores.device))
    if window is not None and block.seen + queries - 1 > window:
        row = torch.arange(queries, device=scores.device)[:, None]
        column = torch.arange(scores.shape[-1], device=scores.device)
        shaped.masked_fill_(column <= row + (block.seen - 1 - window), float("-inf"))


@functools.lru_cache(maxsize=256)
def _corner(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus infinity above the diagonal, zero elsewhere; adding it is faster than filling by a mask."""
    return torch.full((queries, queries), float("-inf"), dtype=dtype, device=device).triu_(1)


def _block_backward(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    grad: Tensor,
    d_q: Tensor,
    d_keys: Tensor,
    d_values: Tensor,
    block: _Block,
    heads: Heads,
) -> None:
    seen = slice(block.low, block.high)
    weights, rows, d_out = _weights(q, keys, block, heads), _take(q, block, heads), _take(grad, block, heads)
    d_values[:, seen].baddbmm_(weights.mT, d_out)
    d_scores = torch.bmm(d_out, values[:, seen].mT)
    # dS = P ∘ (dP − rowsum(dP ∘ P))
    d_scores = torch._softmax_backward_data(d_scores, weights, -1, weights.dtype)
    d_keys[:, seen].baddbmm_(d_scores.mT, rows, alpha=heads.scaling)
    _product(d_scores, keys[:, seen], heads.scaling, d_q, block, heads)
