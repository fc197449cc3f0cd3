"""The table of segments is read as a forest, and segments of like length under one parent are put together."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from phinetune.engine.segments import LEAST_RATIO, PADDED, Segment, group_segments, read_segments

CPU = torch.device("cpu")

# Two roots; the first has two branches, and the second of these has a branch of its own.
TABLE = [(0, 4, -1), (4, 7, 0), (7, 9, 0), (9, 14, 2), (14, 15, -1)]


def table(lengths_and_parents: list[tuple[int, int]]) -> Tensor:
    rows, start = [], 0
    for length, parent in lengths_and_parents:
        rows.append((start, start + length, parent))
        start += length
    return torch.tensor(rows)


def random_forest(seed: int) -> list[Segment]:
    """Some trees, each of up to eight segments in depth-first order."""
    rng = random.Random(seed)
    forest: list[tuple[int, int]] = []
    for _ in range(rng.randint(1, 4)):
        path: list[int] = []
        for _ in range(rng.randint(1, 8)):
            path = path[: rng.randint(1, len(path))] if path else []
            forest.append((rng.choice([1, 2, 7, 8, 10, 12, 40]), path[-1] if path else -1))
            path.append(len(forest) - 1)
    return read_segments(table(forest))


def test_a_segment_sees_its_ancestors_from_the_root_down() -> None:
    assert read_segments(torch.tensor(TABLE)) == [
        Segment(0, 4),
        Segment(4, 7, ((0, 4),)),
        Segment(7, 9, ((0, 4),)),
        Segment(9, 14, ((0, 4), (7, 9))),
        Segment(14, 15),
    ]


def test_the_length_is_that_of_the_own_tokens() -> None:
    assert [len(segment) for segment in read_segments(torch.tensor(TABLE))] == [4, 3, 2, 5, 1]


def test_a_moved_segment_takes_what_is_above_along() -> None:
    assert Segment(9, 14, ((0, 4), (7, 9))).moved(100) == Segment(109, 114, ((100, 104), (107, 109)))
    assert Segment(9, 14).moved(-9) == Segment(0, 5)
    assert Segment(9, 14, ((4, 6),)).moved(-4).moved(4) == Segment(9, 14, ((4, 6),))


def test_like_lengths_come_together_and_others_do_not() -> None:
    groups = group_segments(read_segments(table([(10, -1), (3, -1), (7, -1), (2, -1), (10, -1)])), CPU)
    assert [one.own.shape for one in groups] == [(3, 10), (1, 3), (1, 2)]
    assert [one.own[:, 0].tolist() for one in groups] == [[0, 22, 13], [10], [20]]  # 2 is less than 0.7 · 3


def test_the_longest_of_a_group_is_the_measure() -> None:
    groups = group_segments(read_segments(table([(12, -1), (9, -1), (7, -1), (5, -1)])), CPU)
    assert [one.own.shape for one in groups] == [(2, 12), (2, 7)]  # 7 is like 9, but not like 12


def test_long_ones_are_not_padded() -> None:
    longer = PADDED + 1
    groups = group_segments(read_segments(table([(longer, -1), (longer - 1, -1), (longer, -1), (PADDED - 1, -1)])), CPU)
    assert [one.own.shape for one in groups] == [(2, longer), (2, PADDED)]


def test_the_shorter_ones_are_padded_at_their_ends_with_their_first_token() -> None:
    (one,) = group_segments(read_segments(table([(4, -1), (3, -1)])), CPU)
    assert one.own.tolist() == [[0, 1, 2, 3], [4, 5, 6, 4]]
    assert one.real is not None
    assert one.real.tolist() == [[True] * 4, [True, True, True, False]]


def test_without_padding_there_is_no_mask() -> None:
    (one,) = group_segments(read_segments(table([(4, -1), (4, -1)])), CPU)
    assert one.real is None
    assert one.own.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_branches_are_grouped_by_their_parent_apart_from_roots() -> None:
    groups = group_segments(read_segments(table([(5, -1), (5, 0), (5, 0), (5, -1), (5, 3), (5, 2)])), CPU)
    assert {one.above: one.own[:, 0].tolist() for one in groups} == {
        (): [0, 15],
        ((0, 5),): [5, 10],
        ((15, 20),): [20],
        ((0, 5), (10, 15)): [25],
    }
    assert {one.before for one in groups} == {0, 5, 10}


@pytest.mark.parametrize("seed", range(30))
def test_in_random_forests_every_token_is_own_once_under_its_own_ancestors(seed: int) -> None:
    segments = random_forest(seed)
    above = {token: s.above for s in segments for token in range(s.start, s.stop)}
    ends = {s.start: s.stop for s in segments}
    found: list[int] = []
    for one in group_segments(segments, CPU):
        mask = torch.ones_like(one.own, dtype=torch.bool) if one.real is None else one.real
        assert one.before == sum(stop - start for start, stop in one.above)
        assert bool(mask[0].all())  # the first one is the longest
        for own, real in zip(one.own, mask, strict=True):
            tokens, start = own[real].tolist(), int(own[0])
            assert tokens == list(range(start, ends[start]))
            assert set(own[~real].tolist()) <= {start}
            assert len(tokens) >= LEAST_RATIO * one.own.shape[1]
            assert {above[token] for token in tokens} == {one.above}
            found += tokens
    assert sorted(found) == list(range(segments[-1].stop))
