"""The rows of a step go to the processes by their tokens, and no row is lost, moved to another step or taken twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phinetune.training.balance import StepShape, WithinSteps, balanced
from phinetune.training.row_place import RowsFrom


def of_processes(order: list[int], shape: StepShape) -> list[list[int]]:
    """The rows of each process; they take micro-batches in turn."""
    batches = [order[i : i + shape.batch] for i in range(0, len(order), shape.batch)]
    return [[row for batch in batches[one :: shape.processes] for row in batch] for one in range(shape.processes)]


def test_each_process_gets_alike_many_tokens_in_a_step() -> None:
    lengths, shape = np.array([1000, 10, 900, 20, 100, 30, 50, 40]), StepShape(2, 2, 2)
    order = balanced(range(8), lengths, shape)
    found = [int(lengths[rows].sum()) for rows in of_processes(order, shape)]
    assert found == [1080, 1070]  # in the order that they were drawn in: 1140 and 1010
    batches = [int(lengths[order[i : i + 2]].sum()) for i in range(0, 8, 2)]
    assert max(batches) == 1010  # the longest row has the shortest one beside it


def test_rows_change_places_where_dealing_the_longest_first_leaves_a_gap() -> None:
    lengths, shape = np.array([8, 7, 6, 5, 4, 2]), StepShape(3, 2, 1)  # dealt: 8, 5, 4 and 7, 6, 2
    order = balanced(range(6), lengths, shape)
    assert sorted(int(lengths[rows].sum()) for rows in of_processes(order, shape)) == [16, 16]


def test_the_fullest_of_many_processes_has_little_more_than_the_mean() -> None:
    lengths, shape = np.random.default_rng(0).integers(10, 400, 64), StepShape(2, 16, 2)
    order = balanced(range(64), lengths, shape)
    found = [int(lengths[rows].sum()) for rows in of_processes(order, shape)]
    assert max(found) <= 1.01 * sum(found) / 16  # dealt alone: 1.04


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 20),
)
def test_every_step_has_the_rows_that_it_had(
    tokens: list[int], batch: int, processes: int, accumulation: int, first: int
) -> None:
    lengths, shape = np.array(tokens), StepShape(batch, processes, accumulation)
    drawn = list(np.random.default_rng(0).permutation(len(tokens)))[min(first, len(tokens)) :]
    order = list(WithinSteps(drawn, lengths, shape))
    for start in range(0, len(drawn), shape.rows):
        here = slice(start, start + shape.rows)
        assert sorted(order[here]) == sorted(drawn[here])
    rest = min(first, len(tokens))
    sampler = WithinSteps(RowsFrom(list(range(len(tokens))), rest), lengths, shape)
    assert sorted(sampler) == list(range(rest, len(tokens)))


@pytest.mark.parametrize(("rows", "processes"), [(8, 1), (1, 2)])
def test_where_nothing_can_be_dealt_the_order_stays(rows: int, processes: int) -> None:
    assert balanced(range(rows)[::-1], np.arange(1, 9), StepShape(2, processes, 1)) == list(range(rows))[::-1]


def test_rows_that_fill_no_round_stay_at_the_end() -> None:
    order: Any = balanced([5, 4, 3, 2, 1, 0], np.array([9, 8, 7, 6, 5, 4]), StepShape(1, 4, 2))
    assert order[4:] == [1, 0]
    assert sorted(order[:4]) == [2, 3, 4, 5]
