"""Counting by hand where a run is among its rows."""

from __future__ import annotations

import pytest

from phinetune.training.row_place import RowsFrom, Stretch

# 9 rows an epoch. Four steps of one row are done; then come steps of three.
AFTER_FOUR = Stretch(step=4, epoch=0, row=4, batch=3, accumulation=1)


@pytest.mark.parametrize(
    ("step", "place"),
    [(4, (0, 4)), (5, (0, 7)), (6, (1, 0)), (7, (1, 3)), (9, (2, 0)), (12, (3, 0)), (13, (3, 3))],
)
def test_the_place_after_a_step(step: int, place: tuple[int, int]) -> None:
    assert AFTER_FOUR.place_at(step, 9) == place


@pytest.mark.parametrize(
    ("stretch", "step", "place"),
    [
        (Stretch(0, 0, 0, 2, 2), 2, (0, 8)),  # steps of four: 4, 4, 1
        (Stretch(0, 0, 0, 2, 2), 3, (1, 0)),
        (Stretch(0, 0, 0, 2, 1, drop_last=True), 4, (1, 0)),  # the ninth row is left out
        (Stretch(7, 2, 0, 9, 1), 8, (3, 0)),
    ],
)
def test_accumulation_and_rows_left_out_count(stretch: Stretch, step: int, place: tuple[int, int]) -> None:
    assert stretch.place_at(step, 9) == place


@pytest.mark.parametrize(("epochs", "last"), [(1, 6), (2, 9), (2.5, 11), (3, 12), (0.5, 5), (0.4, 4)])
def test_the_last_step_of_so_many_epochs(epochs: float, last: int) -> None:
    assert AFTER_FOUR.last_step(9, epochs) == last


@pytest.mark.parametrize("epochs", [1, 2, 2.5, 0.5])
def test_a_run_from_its_beginning_has_the_steps_that_transformers_counts(epochs: float) -> None:
    """math.ceil(epochs * steps of an epoch), with three steps."""
    assert Stretch(0, 0, 0, 3, 1).last_step(9, epochs) == {1: 3, 2: 6, 2.5: 8, 0.5: 2}[epochs]


def test_rows_are_those_of_the_sampler_from_there_on() -> None:
    class Reversed:
        """A sampler whose epoch is set."""

        epoch = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter([3, 2, 1, 0])

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Reversed()
    rest = RowsFrom(sampler, 3)
    rest.set_epoch(5)
    assert (list(rest), len(rest), sampler.epoch) == ([0], 1, 5)
    RowsFrom(range(4), 1).set_epoch(1)  # a sampler without epochs is left alone
