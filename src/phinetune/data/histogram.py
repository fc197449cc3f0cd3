"""Rows by their lengths, in bins of equal width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

BINS = 8


class Bin(NamedTuple):
    """Lengths `first` to `last`: rows with so many tokens, and rows with so many trainable ones."""

    first: int
    last: int
    rows: int
    rows_by_trainable_tokens: int


def histogram(lengths: Sequence[tuple[int, int]]) -> list[Bin]:
    """Bins of (tokens, trainable tokens) of rows; as many as the longest row needs."""
    if not lengths:
        return []
    step = bin_width(max(n for n, _ in lengths))
    counts = [[0, 0] for _ in range(BINS)]
    for sizes in lengths:
        for side, size in enumerate(sizes):
            counts[(size - 1) // step][side] += 1
    last = max(i for i, both in enumerate(counts) if any(both))
    return [Bin(i * step + 1, (i + 1) * step, *both) for i, both in enumerate(counts[: last + 1])]


def bin_width(longest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … with which all lengths fit into the bins."""
    width = 1
    while True:
        for digit in (1, 2, 5):
            if digit * width * BINS >= longest:
                return digit * width
        width *= 10
