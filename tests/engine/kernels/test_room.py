"""Room behind the rows of a matrix: it holds zeros, is told apart from other memory, and takes a second matrix."""

from __future__ import annotations

import pytest
import torch

from phinetune.engine.kernels import room


def test_room_holds_zeros_so_that_a_product_that_reads_past_a_row_reads_numbers() -> None:
    like = torch.empty(0)
    for _ in range(20):  # memory that was used before
        torch.full((7, 9), float("nan"))
        assert torch.equal(room.widened(room.empty(like, 7, 5, 4), 4)[:, 5:], torch.zeros(7, 4))


@pytest.mark.parametrize("given", [True, False], ids=["room", "none"])
def test_a_second_matrix_lies_beside_the_first(given: bool) -> None:
    x, more = torch.randn(7, 5), torch.randn(7, 4)
    first = room.empty(x, 7, 5, 4 if given else 0).copy_(x)
    assert room.has(first, 4) is given
    both = room.beside(first, more, given)
    assert torch.equal(both, torch.cat([x, more], dim=1))
    assert (both.data_ptr() == first.data_ptr()) is given


def test_rows_of_another_matrix_have_no_room() -> None:
    wide = torch.zeros(7, 12)
    assert not room.has(torch.zeros(7, 5), 4)
    assert not room.has(torch.zeros(7, 5), 0)
    assert not room.has(wide[:, :5], 4)
    assert not room.has(wide[1:, :8], 4)
    assert not room.has(wide[:, 4:], 4)
