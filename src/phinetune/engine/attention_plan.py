"""Plans attention within the segments of a packed row: which segments are computed together, and where their queries,
keys and values lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.engine.segments import Group, Segment, group_segments


@dataclass(frozen=True)
class Heads:
    """How a token's qkv, (heads + 2 · kv_heads) · size features, is divided into heads, and how attention is computed.

    Attributes:
        heads: how many query heads there are.
        kv_heads: how many key heads there are, and as many value heads.
        size: features of a head.
        scaling: the factor by which scores are multiplied.
        window: how many keys a query sees, its own included. None: its own and all before it.
    """

    heads: int
    kv_heads: int
    size: int
    scaling: float
    window: int | None = None

    @property
    def shared(self) -> int:
        """How many query heads share a key head."""
        return self.heads // self.kv_heads

    @property
    def total(self) -> int:
        """Heads of queries, keys and values together."""
        return self.heads + 2 * self.kv_heads


@dataclass(frozen=True)
class GroupRows:
    """Where the queries, keys, values and outputs of a group lie.

    qkv and the output are seen as matrices of shape (rows, size): each head of each token is one row. The tensors hold
    the numbers of such rows, in the order (segments, kv_heads, tokens, query heads that share the key head).

    Attributes:
        length: own tokens of the longest segment.
        before: tokens of the ancestors.
        q: rows of qkv with the queries, shape (segments · kv_heads, length · query heads that share a key head).
        k, v: rows of qkv with the keys and the values, first the ancestors' and then the segment's own, shape
            (segments · kv_heads, before + length).
        out: rows of the output, same shape as `q`.
        above_k, above_v: rows of qkv with the ancestors' keys and values, shape (kv_heads · before).
        padded: which own tokens are padding, shape (segments · kv_heads, length, 1, 1); None if none is.
    """

    length: int
    before: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    above_k: Tensor
    above_v: Tensor
    padded: Tensor | None

    @property
    def batch(self) -> int:
        """segments · kv_heads."""
        return len(self.q)


@dataclass(frozen=True)
class Groups:
    """The groups that cover a run, and how their results come back into the order of the run's tokens.

    The results of the groups are concatenated, one group after the other. `out` and `qkv` say for each row of the run
    where in this concatenation its result stands.

    Attributes:
        members: the groups.
        out: for the output's rows, shape (tokens · heads). Each group gives the rows in its `out`.
        qkv: for the rows of qkv's gradient, shape (tokens · all heads). Each group gives the rows in its `q`, then
            those in its `k` and in its `v` that belong to the segments' own tokens.
    """

    members: list[GroupRows]
    out: Tensor
    qkv: Tensor


@dataclass(frozen=True)
class Trees:
    """The trees that cover a run, for the native kernels.

    Attributes:
        table: start, stop and the parent's index of each segment, shape (segments, 3).
    """

    table: Tensor


@dataclass(frozen=True)
class Contexts:
    """The segments of a run, each beside the tokens that it sees, for flash attention on a GPU.

    A segment's context is its ancestors' tokens and then its own. The contexts stand one after the other; tokens that
    several segments see stand in each of theirs.

    Attributes:
        queries: where each segment begins in the run, and where the last one ends, shape (segments + 1), int32.
        keys: where each context begins among the contexts, and where the last one ends, shape (segments + 1), int32.
        longest: tokens of the longest segment, and of the longest context.
        tokens: the tokens of the contexts, shape (keys); None: no segment has ancestors, so they are the run's own.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    tokens: Tensor | None


@dataclass(frozen=True)
class AttentionRun:
    """Neighbouring tokens of the row that are computed in the same way.

    Attributes:
        length: how many tokens they are.
        groups: the groups, the trees or the contexts of their segments; positions count from the run's first token.
            None: the run is one long root, and torch's fused attention computes it.
    """

    length: int
    groups: Groups | Trees | Contexts | None


def plan(
    segments: Sequence[Segment], heads: Heads, device: torch.device, fuses: Callable[[int], bool] = lambda length: False
) -> list[AttentionRun]:
    """Plan how to attend within segments. One plan serves all layers.

    Args:
        segments: they cover the row in order. A branch stands after its parent and before the next root.
        device: that of qkv.
        fuses: whether torch's fused attention is faster for a root of so many tokens.

    Returns:
        runs that cover the tokens in order.
    """
    runs: list[list[Segment]] = []
    fused: list[bool] = []
    for i, segment in enumerate(segments):
        branches = i + 1 < len(segments) and bool(segments[i + 1].above)
        # torch's fused attention supports neither branches nor a window.
        simple = not segment.above and not branches and len(segment) <= (heads.window or len(segment))
        alone = simple and fuses(len(segment))
        if alone or not runs or fused[-1]:
            runs.append([])
            fused.append(alone)
        runs[-1].append(segment)
    return [
        fused_run(run) if alone else grouped_run(run, heads, device) for run, alone in zip(runs, fused, strict=True)
    ]


def fused_run(segments: Sequence[Segment]) -> AttentionRun:
    """A run of one root, for torch's fused attention."""
    return AttentionRun(segments[-1].stop - segments[0].start, None)


def trees_run(table: Tensor) -> AttentionRun:
    """A run of all segments in a table, shape (segments, 3), for the native kernels."""
    return AttentionRun(int(table[-1, 1]), Trees(table))


def contexts_run(segments: Sequence[Segment], device: torch.device) -> AttentionRun:
    """A run of all segments of a row, for `phinetune.engine.kernels.attention_flash`."""
    contexts = [(*segment.above, (segment.start, segment.stop)) for segment in segments]
    seen = [sum(stop - start for start, stop in context) for context in contexts]
    own = [len(segment) for segment in segments]
    tokens = None
    if any(segment.above for segment in segments):
        tokens = torch.cat([torch.arange(*part) for context in contexts for part in context]).to(device)
    queries, keys = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (own, seen)
    )
    return AttentionRun(sum(own), Contexts(queries, keys, (max(own), max(seen)), tokens))


def grouped_run(segments: Sequence[Segment], heads: Heads, device: torch.device) -> AttentionRun:
    """A run of whole trees of segments, for the matrix products of `phinetune.engine.kernels.attention_products`."""
    first, length = segments[0].start, segments[-1].stop - segments[0].start
    groups = group_segments([segment.moved(-first) for segment in segments], device)
    # The results for padding go to a token behind the last one, where nothing reads them.
    own = [group.own if group.real is None else group.own.where(group.real, length) for group in groups]
    outs = [_queries(tokens, heads, heads.heads) for tokens in own]
    rows = [part for tokens in own for part in (_queries(tokens, heads, heads.total), *_keys_values(tokens, heads))]
    members = [_group_rows(group, heads) for group in groups]
    return AttentionRun(
        length, Groups(members, _inverse_order(outs, length * heads.heads), _inverse_order(rows, length * heads.total))
    )


def _group_rows(group: Group, heads: Heads) -> GroupRows:
    ranges = [torch.arange(*part) for part in group.above]
    own, above = group.own, torch.cat(ranges or [torch.empty(0, dtype=torch.long)])
    above = above.to(own.device)[None]
    k, v = _keys_values(torch.cat([above.expand(len(own), -1), own], dim=1), heads)
    above_k, above_v = _keys_values(above, heads)
    padded = None if group.real is None else ~group.real.repeat_interleave(heads.kv_heads, dim=0)[..., None, None]
    return GroupRows(
        length=own.shape[1],
        before=above.shape[1],
        q=_queries(own, heads, heads.total),
        k=k,
        v=v,
        out=_queries(own, heads, heads.heads),
        above_k=above_k.flatten(),
        above_v=above_v.flatten(),
        padded=padded,
    )


def _queries(tokens: Tensor, heads: Heads, total: int) -> Tensor:
    """The rows that hold the queries of tokens.

    Args:
        tokens: positions, shape (segments, tokens).
        total: how many rows a token has.

    Returns:
        shape (segments · kv_heads, tokens · query heads that share a key head).
    """
    head = torch.arange(heads.heads, device=tokens.device).view(heads.kv_heads, 1, -1)
    return (tokens[:, None, :, None] * total + head).flatten(0, 1).flatten(1)


def _keys_values(tokens: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """The rows of qkv that hold the keys, and those that hold the values, of tokens.

    Args:
        tokens: positions, shape (segments, tokens).

    Returns:
        each of shape (segments · kv_heads, tokens).
    """
    head = torch.arange(heads.heads, heads.heads + heads.kv_heads, device=tokens.device)[:, None]
    keys = (tokens[:, None] * heads.total + head).flatten(0, 1)
    return keys, keys + heads.kv_heads


def _inverse_order(rows: Sequence[Tensor], count: int) -> Tensor:
    """For each of the first `count` rows, its place in the concatenation of `rows`.

    `rows` names each of these rows once. It may also name rows behind them, which are left out.
    """
    given = torch.cat([part.flatten() for part in rows])
    places = torch.empty(max(count, int(given.max()) + 1), dtype=torch.long, device=given.device)
    places[given] = torch.arange(len(given), device=given.device)
    return places[:count]
