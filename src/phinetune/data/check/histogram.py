"""Counts rows by their lengths: in bins of equal width, and in one more bin for a few rows that are far longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

BINS = 8
USUAL = 0.975  # share of the rows for the bins of equal width, if the longest row is more than twice as long as these


class Bin(NamedTuple):
    """The rows with lengths from `first` to `last`: by their tokens, and by their trainable tokens."""

    first: int
    last: int
    rows: int
    rows_by_trainable_tokens: int


def histogram(lengths: Sequence[tuple[int, int]]) -> list[Bin]:
    """The bins for rows of these lengths, up to the bin of the longest row.

    Args:
        lengths: (tokens, trainable tokens) of each row.
    """
    if not lengths:
        return []
    tokens = sorted(n for n, _ in lengths)
    longest, usual = tokens[-1], tokens[int(USUAL * (len(tokens) - 1))]
    step = bin_width(usual if longest > 2 * usual else longest)
    counts = [[0, 0] for _ in range(BINS + 1)]
    for sizes in lengths:
        for side, size in enumerate(sizes):
            counts[min((size - 1) // step, BINS)][side] += 1
    bins = [Bin(i * step + 1, (i + 1) * step, *both) for i, both in enumerate(counts[:BINS])]
    if any(counts[BINS]):
        return [*bins, Bin(BINS * step + 1, longest, *counts[BINS])]
    return bins[: max(i for i, both in enumerate(counts) if any(both)) + 1]


def bin_width(longest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … with which `BINS` bins cover all lengths up to `longest`."""
    width = 1
    while True:
        for digit in (1, 2, 5):
            if digit * width * BINS >= longest:
                return digit * width
        width *= 10
