"""Decides which rows of a run's files are trained on and how often, and which are held out. Only places are needed, not
the rows.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

from phinetune.errors import DataError

logger = logging.getLogger(__name__)


def split_places(
    counts: Sequence[int], weights: Sequence[float], held_out: set[int], seed: int
) -> tuple[list[int], list[int]]:
    """The places of the rows to train on, and of those to hold out.

    A row to train on stands there as often as its file's weight says, a row to hold out once.

    Args:
        counts: how many rows each file has. Places are numbered through all files, from 0.
        weights: the weight of each file. With 2.5, every row is taken twice, and a half of the rows, drawn by `seed`, a
            third time.
        held_out: the places of the rows to hold out.
    """
    train: list[int] = []
    start = 0
    for i, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        own = [place for place in range(start, start + count) if place not in held_out]
        start += count
        whole = int(weight)
        drawn = set(random.Random(f"{seed} {i}").sample(own, round((weight - whole) * len(own))))
        train += own if weight == 1 else [place for place in own for _ in range(whole + (place in drawn))]
    return train, sorted(held_out)


def held_out_places(count: int, share: float, seed: int, groups: Sequence[int] | None = None) -> set[int]:
    """Which of `count` rows are held out, drawn by `seed`.

    Args:
        groups: for each row the number of its group; rows of a group stay on one side. Without groups of several rows
            the draw is the same as without `groups`. Else the rows drawn bring their groups with them, as far as the
            share allows, and then other groups fill it up.

    Raises:
        DataError: no row would be held out, or no row would be left.
    """
    size = round(count * share)
    if not 0 < size < count:
        raise DataError(f"data.eval: {share} of {count} rows leaves one side empty; give a file instead")
    drawn = random.Random(seed).sample(range(count), size)
    if groups is None or len(set(groups)) == count:
        return set(drawn)
    return _whole_groups(drawn, size, groups, seed)


def shared_places(places: Sequence[int], share: float, seed: int, groups: Sequence[Hashable | None] = ()) -> list[int]:
    """The places of a share of the rows to train on, in order. A smaller share is a part of a larger one.

    The rows are put into an order that `seed` draws, those of a group behind one another, and whole groups are taken
    from the first one until the share is reached.

    Args:
        places: of the rows to train on. One that stands there several times is taken or left as a whole.
        groups: for each row of the sources what it has in common with others; None: nothing. Empty: no row has.
    """
    once = list(dict.fromkeys(places))
    random.Random(f"{seed} share").shuffle(once)
    members: dict[Hashable, list[int]] = defaultdict(list)
    for place in once:
        named = groups[place] if groups else None
        members[("row", place) if named is None else ("group", named)].append(place)
    taken: set[int] = set()
    for group in members.values():
        if len(taken) >= max(1, round(share * len(once))):
            break
        taken.update(group)
    return [place for place in places if place in taken]


def _whole_groups(drawn: Sequence[int], size: int, groups: Sequence[int], seed: int) -> set[int]:
    members: dict[int, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    if len(members) == 1:
        raise DataError(
            f"data.eval: all {len(groups)} rows belong together (they are copies of each other, or have one value in "
            "data.group), so none can be held out; give held-out chats in a file"
        )
    others = sorted(members)
    random.Random(f"{seed} groups").shuffle(others)
    held_out: set[int] = set()
    for group in dict.fromkeys([*(groups[place] for place in drawn), *others]):
        if len(held_out) + len(members[group]) <= size:
            held_out.update(members[group])
    if held_out:
        return held_out
    smallest = min(members.values(), key=len)
    logger.warning(
        "data.eval: %d of %d rows are held out, and not %d: the smallest group of rows that stay together has so many",
        *(len(smallest), len(groups), size),
    )
    return set(smallest)
