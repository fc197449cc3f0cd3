"""Which rows are held out: as ever where no rows belong together, and whole groups where some do."""

from __future__ import annotations

import itertools
import random

import pytest

from phinetune.data.prepare.splits import held_out_places, shared_places, split_places
from phinetune.errors import DataError


def groups_of_size(size: int, count: int) -> list[int]:
    return [place - place % size for place in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_stand_alone_are_drawn_as_without_groups(seed: int) -> None:
    wanted = set(random.Random(seed).sample(range(40), 10))
    assert held_out_places(40, 0.25, seed) == wanted
    assert held_out_places(40, 0.25, seed, list(range(40))) == wanted


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_group_stays_on_one_side_and_the_share_is_met(size: int, seed: int) -> None:
    groups = groups_of_size(size, 60)
    held_out = held_out_places(60, 0.25, seed, groups)
    assert len(held_out) == 15 - 15 % size
    assert not {groups[place] for place in held_out} & {groups[place] for place in set(range(60)) - held_out}


def test_rows_beside_a_pair_stay_where_they_were_drawn() -> None:
    before = held_out_places(40, 0.25, 0)
    first, second = sorted(before)[0], sorted(set(range(40)) - before)[0]
    groups = [min(first, second) if place in (first, second) else place for place in range(40)]
    after = held_out_places(40, 0.25, 0, groups)
    assert len(after) == 10
    assert len(before & after) >= 8
    assert (first in after) == (second in after)


def test_a_group_above_the_share_is_trained_on() -> None:
    groups = [0] * 30 + list(range(30, 40))
    assert held_out_places(40, 0.25, 3, groups) == set(range(30, 40))


def test_groups_that_are_all_above_the_share_give_the_smallest(caplog: pytest.LogCaptureFixture) -> None:
    assert held_out_places(12, 0.1, 0, [0] * 7 + [7] * 5) == set(range(7, 12))
    assert "5 of 12 rows are held out, and not 1: the smallest group" in caplog.text


def test_rows_that_are_all_one_group_are_refused() -> None:
    with pytest.raises(DataError, match="all 12 rows belong together"):
        held_out_places(12, 0.25, 0, [0] * 12)


def test_a_weight_repeats_a_row_on_its_side_only() -> None:
    train, held_out = split_places([4, 2], [2.5, 1], {1, 5}, 0)
    assert held_out == [1, 5]
    assert {place: train.count(place) for place in train} | {4: 1} == {place: train.count(place) for place in train}
    assert set(train) == {0, 2, 3, 4}
    assert sorted(train.count(place) for place in (0, 2, 3)) in ([2, 2, 3], [2, 3, 3])


def test_a_smaller_share_is_a_part_of_a_larger_one_and_groups_stay_together() -> None:
    places, groups = list(range(40)), [place // 4 if place % 3 else None for place in range(40)]
    shares = [shared_places(places, share, 7, groups) for share in (0.125, 0.25, 0.5, 1)]
    for smaller, larger in itertools.pairwise(shares):
        assert set(smaller) < set(larger)
    for share, wanted in zip(shares, (5, 10, 20, 40), strict=True):
        assert wanted <= len(share) <= wanted + 3
        assert share == sorted(share)
        for group in set(groups) - {None}:
            members = {place for place in places if groups[place] == group}
            assert not members & set(share) or members <= set(share)
    assert shared_places(places, 0.5, 8) != shared_places(places, 0.5, 7)


def test_a_row_that_is_taken_several_times_is_taken_or_left_as_a_whole() -> None:
    taken = shared_places([0, 0, 1, 2, 2, 3], 0.5, 0)
    assert len(set(taken)) == 2
    assert all(taken.count(place) == [0, 0, 1, 2, 2, 3].count(place) for place in taken)
