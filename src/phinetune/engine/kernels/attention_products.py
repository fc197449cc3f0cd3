"""Causal attention over groups of packed segments by torch's matrix products, with its backward.

Segments of similar length are computed together, as a group. A block of queries sees a prefix of its segment's
context. So each block needs one product, one softmax over whole rows and another product. Above the diagonal, only
the scores within the block itself are computed. Memory grows with the length, not with its square. Query heads that
share a key head (grouped-query attention) are stacked as rows. The backward computes the softmax again from queries
and keys (Dao et al. 2022, FlashAttention, section 3.1).

Queries, keys and values of a key head are laid out once, one row after the other, and products are written or added
where their result belongs. `attention_ways` chooses how many queries a block has and how many key heads are computed
together.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.engine.attention_plan import GroupRows, Groups, Heads, grouped_run
from phinetune.engine.kernels import attention_ways
from phinetune.engine.kernels.attention_ways import Way
from phinetune.engine.kernels.kept_choices import kept_choice
from phinetune.engine.kernels.matmul import converted, product_dtype, round_into, scratch
from phinetune.engine.segments import Segment

READ_ELEMENTS = 1 << 21  # of queries, keys or values that are laid out at a time: 4 MB in bfloat16


def forward(qkv: Tensor, groups: Groups, heads: Heads) -> Tensor:
    """The output, shape (tokens, heads · size), given qkv with rotated queries and keys."""
    sizes = [group.out.numel() for group in groups.members]
    grouped = qkv.new_empty(sum(sizes), heads.size)
    for group, rows in zip(groups.members, grouped.split(sizes), strict=True):
        _group_forward(qkv, group, rows, heads, _way(group, heads, qkv))
    return grouped.index_select(0, groups.out).view(len(qkv), -1)


def backward(grad: Tensor, qkv: Tensor, groups: Groups, heads: Heads) -> Tensor:
    """The gradient of the rotated qkv, given that of the output."""
    sizes = [group.q.numel() + 2 * group.batch * group.length for group in groups.members]
    grouped = qkv.new_empty(sum(sizes), heads.size)
    above: list[tuple[Tensor, Tensor]] = []
    for group, rows in zip(groups.members, grouped.split(sizes), strict=True):
        above += _group_backward(qkv, grad, group, rows, heads, _way(group, heads, qkv))
    flat = grouped.index_select(0, groups.qkv)
    # The gradients from branches are added last: now every token has the gradient from its own segment.
    for at, from_branches in above:
        flat.index_add_(0, at, from_branches.to(flat.dtype))
    return flat.view_as(qkv)


def _group_forward(qkv: Tensor, group: GroupRows, into: Tensor, heads: Heads, way: Way) -> None:
    """Write a group's output to `into`, shape (rows, size), in the order of the group's `out`."""
    into = into.view(group.batch, -1, heads.size)
    for read in _key_heads_read(group, heads, way):
        states = [_gather(qkv, at[read], heads, use) for at, use in ((group.q, "q"), (group.k, "k"), (group.v, "v"))]
        for chunk in _key_head_chunks(group, heads, way, read):
            q, k, v = (_chunk_of(x, read, chunk) for x in states)
            out = _result(into[chunk], q, "out")
            for block in _blocks(group, heads, way):
                _multiply(_weights(q, k, block, heads), _part(v, block.keys), _part(out, block.rows))
            round_into(out, _alone(into[chunk]))


def _group_backward(
    qkv: Tensor, grad: Tensor, group: GroupRows, into: Tensor, heads: Heads, way: Way
) -> list[tuple[Tensor, Tensor]]:
    """Write a group's gradient of qkv to `into`, shape (rows, size): queries, then keys and values of its own tokens.

    The gradient from padding is zero, or lies in rows that are never read.

    Returns:
        For the keys, then for the values of the tokens above: their rows in qkv, and the gradient to add there.
    """
    sizes = [group.q.numel(), *[group.batch * group.length] * 2]
    own = [rows.view(group.batch, -1, heads.size) for rows in into.split(sizes)]
    above = [into.new_zeros(heads.kv_heads, group.before, heads.size, dtype=product_dtype(qkv)) for _ in ("k", "v")]
    for read in _key_heads_read(group, heads, way):
        states = [_gather(qkv, at[read], heads, use) for at, use in ((group.q, "q"), (group.k, "k"), (group.v, "v"))]
        states.append(_gather(grad, group.out[read], heads, "d_out"))
        if group.padded is not None:
            padded = group.padded[read]
            states[-1].view(*padded.shape[:2], -1, heads.size).masked_fill_(padded, 0)
        for chunk in _key_head_chunks(group, heads, way, read):
            q, k, v, d_out = (_chunk_of(x, read, chunk) for x in states)
            d_q = _result(own[0][chunk], q, "d_q")
            d_kv = [
                _scratch_like(k, use) if group.before else _result(rows[chunk], k, use)
                for rows, use in zip(own[1:], ("d_k", "d_v"), strict=True)
            ]
            for block in _blocks(group, heads, way):
                _block_backward((q, k, v, d_out), (d_q, *d_kv), block, heads)
            round_into(d_q, _alone(own[0][chunk]))
            for found, rows, total in zip(d_kv, own[1:], above, strict=True):
                _keep_own(found, rows[chunk], total, chunk)
    return [(at, total.flatten(0, 1)) for at, total in zip((group.above_k, group.above_v), above, strict=True)]


def _keep_own(found: Tensor, own: Tensor, above: Tensor, chunk: slice) -> None:
    """Bring the gradient of a chunk's keys, or values, to the rows of its own tokens, and add the rest to `above`.

    Args:
        above: for all key heads, shape (kv_heads, tokens above, size).
    """
    before = above.shape[1]
    if before:
        found = found.view(len(own), -1, found.shape[-1])
        head = torch.arange(chunk.start, chunk.stop, device=found.device) % len(above)
        above.index_add_(0, head, found[:, :before])
        own.copy_(found[:, before:])
    else:
        round_into(found, _alone(own))


@dataclass(frozen=True)
class _Block:
    """A block of neighbouring queries, the same for each key head and each segment of a group.

    Attributes:
        tokens: how many tokens the queries belong to.
        rows: the queries' rows. A token has one row for each query head that shares the key head.
        keys: the keys of the context that at least one of the queries sees.
        seen: how many of `keys` the first token sees. Each next token sees one more.
        first: whether the block is the first that is computed, and sees all keys.
    """

    tokens: int
    rows: slice
    keys: slice
    seen: int
    first: bool


def _blocks(group: GroupRows, heads: Heads, way: Way) -> Iterator[_Block]:
    """The blocks of a group, from the last to the first. Without a window, the last block sees all keys."""
    for start in reversed(range(0, group.length, way.queries)):
        stop = min(start + way.queries, group.length)
        first = group.before + start  # the place of the first query's token in its context
        low = 0 if heads.window is None else max(0, first - heads.window + 1)
        rows = slice(start * heads.shared, stop * heads.shared)
        whole = stop == group.length and low == 0
        yield _Block(stop - start, rows, slice(low, group.before + stop), first + 1 - low, whole)


def _key_head_chunks(group: GroupRows, heads: Heads, way: Way, among: slice | None = None) -> Iterator[slice]:
    """Slices of a group's segments · kv_heads, so small that one block has at most `way.scores` scores.

    A slice holds at least one key head. It can hold key heads of several segments.

    Args:
        among: those to cover; None: all.
    """
    first, last = (0, group.batch) if among is None else (among.start, among.stop)
    most = _key_heads_together(group, heads, way)
    for start in range(first, last, most):
        yield slice(start, min(start + most, last))


def _key_heads_together(group: GroupRows, heads: Heads, way: Way) -> int:
    keys = min(group.before + group.length, (heads.window or sys.maxsize) + way.queries)
    return max(1, way.scores // (heads.shared * min(way.queries, group.length) * keys))


def _key_heads_read(group: GroupRows, heads: Heads, way: Way) -> Iterator[slice]:
    """Slices of a group's segments · kv_heads whose states are laid out at a time: whole slices of those above.

    Neighbouring heads of a token lie side by side, so reading several at a time takes far less than each alone.
    """
    together = _key_heads_together(group, heads, way)
    widest = max(group.q.shape[1], group.k.shape[1]) * heads.size
    step = together * max(1, READ_ELEMENTS // (together * widest))
    for start in range(0, group.batch, step):
        yield slice(start, min(start + step, group.batch))


def _gather(states: Tensor, at: Tensor, heads: Heads, use: str) -> Tensor:
    """The rows `at` of `states`, seen as (rows, size), in the dtype in which products are fastest.

    Args:
        at: shape (batch, rows).
        use: a name for the scratch memory; the result is valid until the next call for the same use.

    Returns:
        shape (batch, rows, size).
    """
    rows = states.reshape(-1, heads.size)
    place = scratch(f"rows of {use}", at.numel(), heads.size, states.dtype, states.device)
    found = torch.index_select(rows, 0, at.flatten(), out=place)
    return converted(found, product_dtype(states), use).view(len(at), -1, heads.size)


def _chunk_of(states: Tensor, read: slice, chunk: slice) -> Tensor:
    """The states of a chunk's key heads, of those that were read; without the first dimension if it is one."""
    return _alone(states[chunk.start - read.start : chunk.stop - read.start])


def _alone(x: Tensor) -> Tensor:
    """`x` without its first dimension, if that has one entry."""
    return x[0] if len(x) == 1 else x


def _part(x: Tensor, rows: slice) -> Tensor:
    """Some rows of `x`, shape (rows, size) or (batch, rows, size)."""
    return x[..., rows, :]


def _result(place: Tensor, like: Tensor, use: str) -> Tensor:
    """Where a result for `place`, shape (batch, rows, size), is computed: there, or in scratch memory if the products'
    dtype, that of `like`, is another. `round_into` brings it from there.
    """
    if place.dtype != like.dtype:
        place = scratch(use, place.shape[0] * place.shape[1], place.shape[2], like.dtype, like.device).view_as(place)
    return _alone(place)


def _scratch_like(x: Tensor, use: str) -> Tensor:
    """An uninitialised tensor of x's shape and dtype. Valid until the next call for the same use."""
    return scratch(use, x.numel() // x.shape[-1], x.shape[-1], x.dtype, x.device).view_as(x)


def _multiply(left: Tensor, right: Tensor, into: Tensor, factor: float = 1.0, *, add: bool = False) -> Tensor:
    """Write `factor · left right` to `into`, or add it there. Without `add`, torch does not read what `into` holds."""
    multiply = torch.addmm if left.dim() == 2 else torch.baddbmm
    return multiply(into, left, right, beta=1 if add else 0, alpha=factor, out=into)


def _weights(q: Tensor, k: Tensor, block: _Block, heads: Heads) -> Tensor:
    """The attention weights of a block, shape (…, tokens · heads sharing a key, keys), in scratch memory."""
    scores = _multiply(_part(q, block.rows), _part(k, block.keys).mT, _scores(q, block, "weights"), heads.scaling)
    _mask(scores.view(-1, block.tokens, heads.shared, scores.shape[-1]), block, heads.window)
    return torch.softmax(scores, dim=-1, out=scores)


def _scores(q: Tensor, block: _Block, use: str) -> Tensor:
    """Scratch memory for a number for each of a block's queries and keys."""
    keys, batch = block.keys.stop - block.keys.start, q.shape[:-2]
    rows = block.rows.stop - block.rows.start
    made = scratch(use, rows * (batch[0] if batch else 1), keys, q.dtype, q.device)
    return made.view(*batch, rows, keys)


def _mask(scores: Tensor, block: _Block, window: int | None) -> None:
    """Set scores to minus infinity where a query must not see a key: after its own token, and before its window.

    Args:
        scores: shape (batch, tokens, heads sharing a key, keys). They are changed in place.
    """
    queries, keys = scores.shape[1], scores.shape[3]
    after, before = _triangles(max(64, 1 << (queries - 1).bit_length()), scores.dtype, scores.device)
    scores[..., block.seen - 1 :] += after[:queries, :, :queries]
    if window is not None and keys > window:
        spare = window - block.seen  # how many queries after the first also see the first key
        scores[..., : queries - 1 - spare] += before[:queries, :, spare : queries - 1]


@functools.lru_cache(maxsize=64)
def _triangles(queries: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two masks to add to scores. Adding a mask is faster than filling by a boolean mask.

    Returns:
        minus infinity above the diagonal and zero elsewhere, then minus infinity below it and zero elsewhere, each of
        shape (queries, 1, queries). The first rows and columns of a mask are the mask for fewer queries.
    """
    full = torch.full((queries, queries), float("-inf"), dtype=dtype, device=device)
    return full.triu(1)[:, None], full.tril(-1)[:, None]


def _block_backward(inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], block: _Block, heads: Heads) -> None:
    """Write a block's gradient of the queries, and add its gradients of keys and values to those of the blocks before.

    Args:
        inputs: q, k, v and the gradient of the output.
        grads: the gradients of q, k and v. What those of k and v hold before the first block is not read.
    """
    (q, k, v, d_out), (d_q, d_k, d_v) = inputs, grads
    add = not block.first
    if heads.window is not None and block.rows.stop == q.shape[-2] and add:
        d_k.zero_(), d_v.zero_()
    rows, keys = functools.partial(_part, rows=block.rows), functools.partial(_part, rows=block.keys)
    weights = _weights(q, k, block, heads)
    _multiply(weights.mT, rows(d_out), keys(d_v), add=add)
    d_scores = _multiply(rows(d_out), keys(v).mT, _scores(q, block, "d_scores"))
    # dS = P ∘ (dP − rowsum(dP ∘ P))
    torch._softmax_backward_data(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
    _multiply(d_scores.mT, rows(q), keys(d_k), heads.scaling, add=add)
    _multiply(d_scores, keys(k), rows(d_q), heads.scaling)


# -- how it is computed fastest here ------------------------------------------------------------------------------


def _way(group: GroupRows, heads: Heads, qkv: Tensor) -> Way:
    """The fastest way for a group, measured when the first of its kind is met."""
    crossed = heads.window is not None and heads.window < group.before + group.length
    kind = attention_ways.kind(group.length, qkv.device, crossed)
    return kind if isinstance(kind, Way) else _fastest(kind, heads, product_dtype(qkv))


@functools.lru_cache
def _fastest(length: int, heads: Heads, dtype: torch.dtype) -> Way:
    """Of the ways for segments of `length` tokens, the one that was fastest on this CPU when it first met them."""
    few = attention_ways.sample(length, heads)
    qkv = torch.randn(length, few.total * few.size, dtype=dtype)
    run = grouped_run([Segment(0, length)], few, qkv.device)
    assert isinstance(run.groups, Groups)
    (group,) = run.groups.members
    out = torch.empty(group.out.numel(), few.size, dtype=dtype)
    grads = torch.empty(qkv.numel() // few.size, few.size, dtype=dtype)

    def seconds(way: Way) -> float:
        start = time.perf_counter()
        _group_forward(qkv, group, out, few, way)
        _group_backward(qkv, out, group, grads, few, way)
        return time.perf_counter() - start

    ways = attention_ways.candidates(length)
    return kept_choice(
        f"segments of {length} tokens, {heads}, {dtype}",
        {str(way): way for way in ways},
        lambda: str(attention_ways.fastest(ways, seconds)),
    )
