"""Decides which rows of a run's files are trained on and how often, and which are held out. Only places are needed, not
the rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from phinetune.errors import DataError


def split_places(
    counts: Sequence[int], weights: Sequence[float], share: float | None, seed: int
) -> tuple[list[int], list[int]]:
    """The places of the rows to train on, and of those to hold out.

    A row to train on stands there as often as its file's weight says, a row to hold out once.

    Args:
        counts: how many rows each file has. Places are numbered through all files, from 0.
        weights: the weight of each file. With 2.5, every row is taken twice, and a half of the rows, drawn by `seed`, a
            third time.
        share: the fraction of all rows to hold out; None is none.

    Raises:
        DataError: no row would be held out, or no row would be left to train on.
    """
    held_out = held_out_places(sum(counts), share, seed) if share is not None else set()
    train: list[int] = []
    start = 0
    for i, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        own = [place for place in range(start, start + count) if place not in held_out]
        start += count
        whole = int(weight)
        drawn = set(random.Random(f"{seed} {i}").sample(own, round((weight - whole) * len(own))))
        train += own if weight == 1 else [place for place in own for _ in range(whole + (place in drawn))]
    return train, sorted(held_out)


def held_out_places(count: int, share: float, seed: int) -> set[int]:
    """Which of `count` rows are held out, drawn by `seed`.

    Raises:
        DataError: no row would be held out, or no row would be left.
    """
    size = round(count * share)
    if not 0 < size < count:
        raise DataError(f"data.eval: {share} of {count} rows leaves one side empty; give a file instead")
    return set(random.Random(seed).sample(range(count), size))
