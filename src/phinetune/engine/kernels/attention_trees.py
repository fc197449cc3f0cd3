"""Causal attention over trees of packed segments by native kernels, with its backward.

Blocks of queries meet blocks of keys where they lie in memory, and the softmax is computed as the blocks pass (Dao et
al. 2022, FlashAttention, algorithms 1 and 4). The backward needs the output and each query's log of the sum of
exp(score), which is what is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from phinetune.engine.attention_plan import Groups, Heads, grouped_run
from phinetune.engine.kernels import attention_products, room
from phinetune.engine.kernels.native.operator import Operator, drawn
from phinetune.engine.segments import read_segments


def takes(like: Tensor) -> bool:
    """Whether the native kernels compute attention for states of `like`'s dtype and device."""
    return _attend.is_native(like) and _attend_backward.is_native(like)


def forward(
    qkv: Tensor, segments: Tensor, heads: Heads, keep: bool = True, behind: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The output, shape (tokens, heads · size), given qkv with rotated queries and keys.

    Args:
        segments: a table that covers the tokens, shape (segments, 3); see `phinetune.engine.segments.read_segments`.
        keep: whether to return what the backward needs besides.
        behind: the output's room behind its rows (`kernels.room`).

    Returns:
        the output, and log of the sum of exp(scaled score) of each query, shape (tokens, heads), in float32.
    """
    out = room.empty(qkv, len(qkv), heads.heads * heads.size, behind)
    log_sums = qkv.new_empty(len(qkv), heads.heads, dtype=torch.float32) if keep else None
    _attend(qkv, segments, *_shape(heads), out, log_sums)
    return out, log_sums


def backward(
    grad: Tensor, qkv: Tensor, segments: Tensor, heads: Heads, out: Tensor, log_sums: Tensor, back: int = 0
) -> Tensor:
    """The gradient of the rotated qkv, with `back` elements of room behind its rows.

    Args:
        grad: that of the output.
        out, log_sums: what the forward returned.
    """
    d_qkv = room.empty(qkv, len(qkv), qkv.shape[1], back)
    _attend_backward(grad.contiguous(), qkv, segments, *_shape(heads), out, log_sums, d_qkv)
    return d_qkv


def _shape(heads: Heads) -> tuple[int, int, int, float, int]:
    return heads.heads, heads.kv_heads, heads.size, heads.scaling, heads.window or 0


def _by_torch(qkv: Tensor, segments: Tensor, *shape_and_out: Any) -> None:
    """Write the output by matrix products. They have no use for the log of sums and do not write it."""
    *shape, out, _ = shape_and_out
    out.copy_(attention_products.forward(qkv, *_grouped(segments, *shape)))


def _backward_by_torch(grad: Tensor, qkv: Tensor, segments: Tensor, *shape_and_kept: Any) -> None:
    """Write the gradient of qkv by matrix products."""
    *shape, _, _, d_qkv = shape_and_kept
    d_qkv.copy_(attention_products.backward(grad, qkv, *_grouped(segments, *shape)))


def _grouped(
    segments: Tensor, heads: int, kv_heads: int, size: int, scaling: float, window: int
) -> tuple[Groups, Heads]:
    found = Heads(heads, kv_heads, size, scaling, window or None)
    rows = tuple((start, stop, parent) for start, stop, parent in segments.tolist())
    return _groups(rows, found), found


@functools.lru_cache(maxsize=4)
def _groups(rows: tuple[tuple[int, int, int], ...], heads: Heads) -> Groups:
    groups = grouped_run(read_segments(torch.tensor(rows)), heads, torch.device("cpu")).groups
    assert isinstance(groups, Groups)
    return groups


SAMPLE = Heads(4, 4, 96, 96**-0.5)


def _sample(kind: torch.dtype) -> tuple[Any, ...]:
    """A prompt with two answers."""
    segments = torch.tensor([(0, 300, -1), (300, 400, 0), (400, 500, 0)])
    (qkv,) = drawn((500, SAMPLE.total * SAMPLE.size), kind=kind)
    return qkv, segments, *_shape(SAMPLE), torch.empty(500, SAMPLE.heads * SAMPLE.size, dtype=kind), None


def _backward_sample(kind: torch.dtype) -> tuple[Any, ...]:
    qkv, segments, *_ = _sample(kind)
    out, log_sums = _reference(qkv, segments, SAMPLE)
    (grad,) = drawn((500, SAMPLE.heads * SAMPLE.size), kind=kind)
    return grad, qkv, segments, *_shape(SAMPLE), out, log_sums, torch.empty_like(qkv)


def _reference(qkv: Tensor, segments: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """What `forward` returns, by the formula, over the whole row under a dense mask."""
    q, k, v = (part.transpose(0, 1).float() for part in qkv.view(len(qkv), -1, heads.size).split(heads.heads, dim=1))
    hidden = torch.ones(len(qkv), len(qkv), dtype=torch.bool)
    for segment in read_segments(segments):
        own = slice(segment.start, segment.stop)
        hidden[own, own] = torch.ones(len(segment), len(segment), dtype=torch.bool).triu(1)
        for start, stop in segment.above:
            hidden[own, start:stop] = False
    scores = (q @ k.mT * heads.scaling).masked_fill(hidden, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1).to(qkv.dtype)
    return out, scores.logsumexp(-1).T.contiguous()


_attend = Operator("attend", _by_torch, _sample, products=True)
_attend_backward = Operator("attend_backward", _backward_by_torch, _backward_sample, products=True)
