"""A packed row is cut into what torch's fused attention takes and what blocks take; each row has one source."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.kernels.attention_cases import each_forest, sees, table
from phinetune.engine.attention_plan import Contexts, Groups, Heads, contexts_run, grouped_run, plan
from phinetune.engine.segments import Segment, read_segments

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 8, 0.4)
WINDOWED = Heads(4, 2, 8, 0.4, window=45)
TREE = [Segment(0, 34), Segment(34, 74, ((0, 34),)), Segment(74, 109, ((0, 34),))]
MIXED = [(0, 40), (40, 45), (45, 78), (78, 128)]


def row() -> list[Segment]:
    """Roots of 40, 5, 33 and 50 tokens, a tree, roots of 7, 60 and 32."""
    tree = [segment.moved(128) for segment in TREE]
    return [*(Segment(*at) for at in MIXED), *tree, Segment(237, 244), Segment(244, 304), Segment(304, 336)]


def to_torch(segments: list[Segment], heads: Heads, fused_from: int = 32) -> list[int]:
    """Lengths of the runs that go to torch's attention."""
    runs = plan(segments, heads, CPU, lambda length: length > fused_from)
    assert sum(run.length for run in runs) == segments[-1].stop
    return [run.length for run in runs if run.groups is None]


def test_long_roots_alone_go_to_the_fused_attention() -> None:
    assert to_torch(row(), HEADS) == [40, 33, 50, 60]  # neither 34, which branches, nor 32
    assert to_torch(row(), WINDOWED) == [40, 33]
    assert to_torch(row(), HEADS, 60) == []
    assert to_torch([Segment(0, 40), Segment(40, 41, ((0, 40),))], HEADS) == []


def grouped(segments: list[Segment], heads: Heads = HEADS) -> Groups:
    run = grouped_run(segments, heads, CPU)
    assert run.groups is not None
    return run.groups


@pytest.mark.parametrize("heads", [HEADS, Heads(3, 3, 8, 0.4)], ids=["two queries per key", "one query per key"])
def test_every_row_has_one_source_and_no_padding_is_one(heads: Heads) -> None:
    """What a group reads of a row, at the place which the row takes it from, is that row."""
    segments = row()
    groups = grouped(segments, heads)
    tokens = segments[-1].stop
    assert any(one.padded is not None for one in groups.members)
    outs = torch.cat([one.out.flatten() for one in groups.members])
    assert torch.equal(outs[groups.out], torch.arange(tokens * heads.heads))
    parts = [(one.q, one.k[:, one.before :], one.v[:, one.before :]) for one in groups.members]
    given = torch.cat([part.flatten() for three in parts for part in three])
    assert torch.equal(given[groups.qkv], torch.arange(tokens * heads.total))
    padding = torch.cat([_padding(part, one.padded, heads) for one in groups.members for part in (one.out,)])
    assert not padding[groups.out].any()


def _padding(rows: torch.Tensor, padded: torch.Tensor | None, heads: Heads) -> torch.Tensor:
    if padded is None:
        return torch.zeros(rows.numel(), dtype=torch.bool)
    return padded.expand(-1, -1, heads.shared, -1).flatten()


def test_a_branch_reads_what_is_above_it_first() -> None:
    root, branches = grouped(TREE).members
    assert (root.before, root.length) == (0, 34)
    assert (branches.before, branches.length, branches.batch) == (34, 40, 2 * HEADS.kv_heads)
    first, total = HEADS.heads, HEADS.total
    assert branches.k[0].tolist() == [token * total + first for token in range(74)]
    assert branches.v[1, :34].tolist() == [token * total + first + 3 for token in range(34)]
    assert branches.above_k.tolist() == [token * total + first + head for head in (0, 1) for token in range(34)]


def test_a_row_cut_off_its_start_is_counted_from_there() -> None:
    moved = grouped([segment.moved(100) for segment in TREE])
    for i, (first, second) in enumerate(zip(grouped(TREE).members, moved.members, strict=True)):
        assert torch.equal(first.q, second.q), f"group {i}"
        assert torch.equal(first.above_v, second.above_v), f"group {i}"


@each_forest
def test_contexts_aligned_at_their_ends_show_each_token_what_it_sees(forest: list[tuple[int, int]]) -> None:
    """A causal mask of a segment's queries and its context's keys, aligned at the last of both, as flash attention has
    it, lets through what the forest lets through.
    """
    segments = table(forest)
    run = contexts_run(read_segments(torch.tensor(segments)), CPU)
    found = run.groups
    assert isinstance(found, Contexts)
    assert run.length == segments[-1][1]
    tokens = torch.arange(run.length) if found.tokens is None else found.tokens
    mask = torch.zeros(run.length, run.length, dtype=torch.bool)
    queries, keys = found.queries.tolist(), found.keys.tolist()
    for (first, last), (start, stop) in zip(pairwise(queries), pairwise(keys), strict=True):
        seen = torch.ones(last - first, stop - start, dtype=torch.bool).tril((stop - start) - (last - first))
        mask[first:last, tokens[start:stop]] = seen
    assert torch.equal(mask, sees(segments, None))
    assert found.longest == (max(b - a for a, b in pairwise(queries)), max(b - a for a, b in pairwise(keys)))
    assert found.queries.dtype == found.keys.dtype == torch.int32
