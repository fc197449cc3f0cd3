"""Which rows of a run's files are trained on, how often, and which are held out: by place, the rows unread."""

from __future__ import annotations

import random
from collections.abc import Sequence

from phinetune.errors import DataError


def split_places(
    counts: Sequence[int], weights: Sequence[float], share: float | None, seed: int
) -> tuple[list[int], list[int]]:
    """Places to train on, each row as often as the weight of its file says, and places held out, each once.

    Args:
        counts: rows of each file; places count through them all.
        weights: of each file. The part after the point falls to rows drawn by `seed`.
        share: of all rows to hold out; None is none.

    Raises:
        DataError: the share leaves one side empty.
    """
    held = held_out_places(sum(counts), share, seed) if share is not None else set()
    train: list[int] = []
    start = 0
    for i, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        own = [place for place in range(start, start + count) if place not in held]
        start += count
        whole = int(weight)
        drawn = set(random.Random(f"{seed} {i}").sample(own, round((weight - whole) * len(own))))
        train += own if weight == 1 else [place for place in own for _ in range(whole + (place in drawn))]
    return train, sorted(held)


def held_out_places(count: int, share: float, seed: int) -> set[int]:
    """Which of `count` rows are held out.

    Raises:
        DataError: one side would be empty.
    """
    held = round(count * share)
    if not 0 < held < count:
        raise DataError(f"data.eval: {share} of {count} rows leaves one side empty; give a file instead")
    return set(random.Random(seed).sample(range(count), held))
