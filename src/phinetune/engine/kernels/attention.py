"""Causal attention over packed segments, with its own backward.

On a CPU native kernels compute it where there are some (`attention_trees`), and on a GPU flash attention in 16 bits
(`attention_flash`). Torch's matrix products compute the rest (`attention_products`), but for roots that torch's own
fused attention computes faster: long ones in float32, and on a GPU all that it can.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import record_function

from phinetune.engine.attention_plan import (
    AttentionRun,
    Contexts,
    Groups,
    Heads,
    Trees,
    contexts_run,
    fused_run,
    grouped_run,
    plan,
    trees_run,
)
from phinetune.engine.kernels import attention_flash, attention_products, attention_trees, attention_ways
from phinetune.engine.kernels.kept_choices import kept_choice
from phinetune.engine.kernels.rotary import rotate_
from phinetune.engine.segments import Segment

PROFILED = "phinetune::attention"  # the name under which a profile finds the time of both directions
FUSED_FROM = 2048  # tokens; up to this length a CPU computes roots by products without asking which is faster


def planned(table: Tensor, segments: Sequence[Segment], heads: Heads, like: Tensor) -> list[AttentionRun]:
    """How attention in a packed row is computed. One plan serves all layers.

    Args:
        table: of the segments, shape (segments, 3).
        segments: what `read_segments` makes of it.
        like: a tensor of the states' dtype and device.
    """
    if attention_trees.takes(like):
        return [trees_run(table)]
    if attention_flash.takes(like, heads, segments):
        return [contexts_run(segments, like.device)]
    return plan(
        segments, heads, like.device, functools.partial(fuses, heads=heads, dtype=like.dtype, device=like.device)
    )


def attention(qkv: Tensor, cos: Tensor, sin: Tensor, runs: Sequence[AttentionRun], heads: Heads) -> Tensor:
    """Rotate queries and keys, then attend within segments.

    Args:
        qkv: the output of the fused projection, shape (tokens, (heads + 2 · kv_heads) · size). It is overwritten.
        cos, sin: shape (tokens, m), for the first 2·m features of each head.
        runs: what `planned` returns. The runs cover the tokens in order.

    Returns:
        shape (tokens, heads · size).
    """
    if len(runs) == 1 and runs[0].groups is not None:
        return _own(qkv, cos, sin, runs[0].groups, heads)
    qkv = _Rotate.apply(qkv, cos, sin, heads)  # type: ignore[no-untyped-call]
    parts = qkv.split([run.length for run in runs])
    return torch.cat([_attend(part, run, heads) for part, run in zip(parts, runs, strict=True)])


def _attend(qkv: Tensor, run: AttentionRun, heads: Heads) -> Tensor:
    """The output for a run's tokens. Queries and keys in `qkv` are rotated already."""
    return _fused(qkv, heads) if run.groups is None else _own(qkv, None, None, run.groups, heads)


def _own(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, groups: Groups | Trees | Contexts, heads: Heads
) -> Tensor:
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
    """Attention over groups, trees or contexts of segments. First rotates qkv in place, if cos and sin are given.

    Keeps the rotated qkv, cos and sin for the backward; but for groups also the output and the log of each query's sum.

    For trees there is room behind the rows (`kernels.room`): `behind` elements for the output, `back` for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        groups: Groups | Trees | Contexts,
        heads: Heads,
        behind: int = 0,
        back: int = 0,
    ) -> Tensor:
        ctx.groups, ctx.heads, ctx.back = groups, heads, back
        with record_function(PROFILED):
            if cos is not None and sin is not None:
                _rotate_qk(qkv, cos, sin, heads)
            kept: tuple[Tensor | None, ...] = ()
            if isinstance(groups, Groups):
                out = attention_products.forward(qkv, groups, heads)
            elif isinstance(groups, Trees):
                out, log_sums = attention_trees.forward(qkv, groups.table, heads, ctx.needs_input_grad[0], behind)
                kept = (out, log_sums)
            else:
                out, *state = attention_flash.forward(qkv, groups, heads)
                kept = (out, *state)
        ctx.save_for_backward(qkv, cos, sin, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, *kept = ctx.saved_tensors
        with record_function(PROFILED):
            if isinstance(ctx.groups, Groups):
                d_qkv = attention_products.backward(grad, qkv, ctx.groups, ctx.heads)
            elif isinstance(ctx.groups, Trees):
                out, log_sums = kept
                d_qkv = attention_trees.backward(grad, qkv, ctx.groups.table, ctx.heads, out, log_sums, ctx.back)
            else:
                d_qkv = attention_flash.backward(grad, qkv, ctx.groups, ctx.heads, *kept)
            if cos is not None and sin is not None:
                _rotate_qk(d_qkv, cos, sin, ctx.heads, back=True)
        return d_qkv, None, None, None, None, None, None


# -- where torch's fused attention is faster ----------------------------------------------------------------------


def fuses(length: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's fused attention computes a root of `length` tokens. Its bfloat16 on a CPU is never faster."""
    if device.type != "cpu":
        return True
    return length > FUSED_FROM and dtype == torch.float32 and _fused_is_faster(heads)


@functools.lru_cache
def _fused_is_faster(heads: Heads) -> bool:
    """Whether this CPU computes a long root of one key head faster by torch's fused attention, in float32."""
    few = attention_ways.sample(attention_ways.TIMED, heads)
    segments, cpu = [Segment(0, attention_ways.TIMED)], torch.device("cpu")
    cos = torch.ones(attention_ways.TIMED, 1)
    runs = {"products": grouped_run(segments, few, cpu), "fused": fused_run(segments)}

    def seconds(run: AttentionRun) -> float:
        with torch.inference_mode(False), torch.enable_grad():
            qkv = torch.randn(run.length, few.total * few.size, requires_grad=True)
            start = time.perf_counter()
            attention(qkv * 1, cos, cos, [run], few).sum().backward()
            return time.perf_counter() - start

    return kept_choice(
        f"long float32 roots of {heads}",
        {"products": False, "fused": True},
        lambda: attention_ways.fastest(list(runs), lambda which: seconds(runs[which])),
    )
