"""Bins hold every row once, whatever the lengths."""

from __future__ import annotations

import random

import pytest

from phinetune.data.check.histogram import BINS, Bin, bin_width, histogram


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 5), (41, 10), (750, 100), (8001, 2000)]
)
def test_widths_are_round_and_just_wide_enough(longest: int, width: int) -> None:
    assert bin_width(longest) == width


def test_every_row_is_in_one_bin() -> None:
    draw = random.Random(0)
    lengths = [(n, draw.randint(1, n)) for n in (draw.randint(1, 900) for _ in range(500))]
    bins = histogram(lengths)
    assert len(bins) <= BINS
    assert sum(b.rows for b in bins) == sum(b.rows_by_trainable_tokens for b in bins) == 500
    assert [one.rows for one in bins] == [sum(one.first <= n <= one.last for n, _ in lengths) for one in bins]
    assert [one.rows_by_trainable_tokens for one in bins] == [
        sum(one.first <= trainable <= one.last for _, trainable in lengths) for one in bins
    ]


def test_a_few_far_longer_rows_share_the_last_bin() -> None:
    lengths = [(n, 1) for n in range(1, 81)] + [(5000, 4000)]
    bins = histogram(lengths)
    assert len(bins) == BINS + 1
    assert bins[-1] == Bin(81, 5000, 1, 1)
    assert [one.rows for one in bins[:-1]] == [10] * BINS
    assert bins[0] == Bin(1, 10, 10, 80)


def test_none_for_no_rows() -> None:
    assert histogram([]) == []
    assert histogram([(3, 1)]) == [Bin(1, 1, 0, 1), Bin(2, 2, 0, 0), Bin(3, 3, 1, 0)]
