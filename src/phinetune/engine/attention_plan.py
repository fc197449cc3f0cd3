"""How to attend within the segments of a packed row: what is computed together, and where its rows lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phinetune.engine.rows import Group, Segment, group

FLASH_FROM = 2048  # tokens, on a CPU in float32; benchmarks/attention.py measures both


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
    """A group, and where its heads lie: rows of qkv and of the output, seen as (rows, size).

    A group's heads are laid out as (segments, kv_heads, tokens, heads sharing the key).

    Attributes:
        length: own tokens of the longest segment.
        before: tokens above.
        q, out: where to read, shape (segments · kv_heads, length · heads sharing a key).
        k, v: likewise, shape (segments · kv_heads, before + length).
        above_k, above_v: keys and values of the tokens above, shape (kv_heads · before).
        padded: own tokens that are padding, shape (segments · kv_heads, length, 1, 1); None where none is.
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
    """Groups that cover a run, and where each row finds its own among what they give one after the other.

    Attributes:
        out: of the output's rows, shape (tokens · heads); each group gives its `out`.
        qkv: of qkv's gradient's, shape (tokens · heads in all); each group gives `q`, then its own tokens' `k` and `v`.
    """

    placed: list[Placed]
    out: Tensor
    qkv: Tensor


@dataclass(frozen=True)
class AttentionRun:
    """Tokens of the row next to each other that are computed in one way.

    Attributes:
        groups: of their segments, counted from the run's first token; None: one long root, which goes to torch's
            fused attention.
    """

    length: int
    groups: Groups | None


def plan(segments: Sequence[Segment], heads: Heads, dtype: torch.dtype, device: torch.device) -> list[AttentionRun]:
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
    return [
        fused_run(run) if alone else grouped_run(run, heads, device) for run, alone in zip(runs, fused, strict=True)
    ]


def _fused_from(dtype: torch.dtype, device: torch.device) -> float:
    """Length from which torch's fused attention wins. On a CPU its bfloat16 backward never does."""
    if device.type != "cpu":
        return 0
    return FLASH_FROM if dtype == torch.float32 else math.inf


def fused_run(segments: Sequence[Segment]) -> AttentionRun:
    """One root, by torch's fused attention."""
    return AttentionRun(segments[-1].stop - segments[0].start, None)


def grouped_run(segments: Sequence[Segment], heads: Heads, device: torch.device) -> AttentionRun:
    """Whole trees of segments, by blocks of products."""
    first, length = segments[0].start, segments[-1].stop - segments[0].start
    groups = group([s.moved(-first) for s in segments], device)
    # What the padding gives is for a token behind the last.
    own = [one.own if one.there is None else one.own.where(one.there, length) for one in groups]
    outs = [_queries(at, heads, heads.heads) for at in own]
    rows = [part for at in own for part in (_queries(at, heads, heads.total), *_keys_values(at, heads))]
    placed = [_placed(one, heads) for one in groups]
    return AttentionRun(
        length, Groups(placed, _sources(outs, length * heads.heads), _sources(rows, length * heads.total))
    )


def _placed(one: Group, heads: Heads) -> Placed:
    own, above = one.own, torch.cat([torch.arange(*part) for part in one.above] or [torch.empty(0, dtype=torch.long)])
    above = above.to(own.device)[None]
    k, v = _keys_values(torch.cat([above.expand(len(own), -1), own], dim=1), heads)
    above_k, above_v = _keys_values(above, heads)
    padded = None if one.there is None else ~one.there.repeat_interleave(heads.kv_heads, dim=0)[..., None, None]
    return Placed(
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


def _queries(at: Tensor, heads: Heads, total: int) -> Tensor:
    """Rows of the queries of tokens `at`, shape (segments, tokens), where a token has `total` rows."""
    head = torch.arange(heads.heads, device=at.device).view(heads.kv_heads, 1, -1)
    return (at[:, None, :, None] * total + head).flatten(0, 1).flatten(1)


def _keys_values(at: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Rows of qkv with the keys, and with the values, of tokens `at`, shape (segments, tokens)."""
    head = torch.arange(heads.heads, heads.heads + heads.kv_heads, device=at.device)[:, None]
    keys = (at[:, None] * heads.total + head).flatten(0, 1)
    return keys, keys + heads.kv_heads


def _sources(rows: Sequence[Tensor], count: int) -> Tensor:
    """For each of `count` rows its place among `rows`, which name each of them once, and any behind the last."""
    given = torch.cat([part.flatten() for part in rows])
    places = torch.empty(max(count, int(given.max()) + 1), dtype=torch.long, device=given.device)
    places[given] = torch.arange(len(given), device=given.device)
    return places[:count]
