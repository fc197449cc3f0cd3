"""The share of what stands in one row only is counted over trained tokens, row by row."""

from __future__ import annotations

import pytest

from phinetune.engine.examples import Encoded
from phinetune.training.unlike_rows import share_in_one_row


def row(*ids: int, read: int = 0) -> Encoded:
    """A row whose first `read` tokens have no label."""
    return Encoded(list(ids), [-100 if i < read else token for i, token in enumerate(ids)])


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([], 0.0),
        ([row(1)], 0.0),
        ([row(1, 2, 3)], 1.0),
        ([row(1, 2, 3), row(7, 1, 2, 3, read=1)], 0.0),
        ([row(1, 2, 3), row(1, 2, 3)], 1.0),  # one row, taken twice
        ([row(1, 2, 3), row(1, 2, 4)], 0.5),
        ([row(1, 2), row(2, 1)], 1.0),  # another order is another pair
        ([row(1, 2, 1, 2, 1, 2)], 1.0),  # oftener in one row is still one row
        ([row(1, 2, 1, 2), row(1, 2, 5)], 0.4),  # 2 1 and 2 5, of five pairs
        ([row(7, 8, 1, 2, read=2), row(7, 8, 1, 3, read=2)], 1.0),  # what is only read does not count
        ([row(7, 8, 1, 2, read=1), row(7, 8, 1, 3, read=1)], 0.5),
        ([Encoded([1, 2, 3, 4], [1, -100, 3, 4]), row(9, 9)], 1.0),  # tokens that are no neighbours make no pair
        ([row(1, 200_000), row(1, 200_000, 2), row(2, 200_000)], 2 / 4),
    ],
)
def test_the_share(rows: list[Encoded], share: float) -> None:
    assert share_in_one_row(rows) == pytest.approx(share)
