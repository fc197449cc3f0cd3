"""The sentences about held-out rows that were trained on."""

from __future__ import annotations

import pytest

from phinetune.data.prepare.shared_rows import Shared, all_shared, shared_sentences


@pytest.mark.parametrize(
    ("shared", "lines"),
    [
        (Shared(40, 0, 0, 0), []),
        (Shared(40, 12, 0, 0), ["12 of 40 held-out chats are copies of training rows; the comparison is too kind"]),
        (
            Shared(40, 1, 2, 0),
            ["1 of 40 held-out chats is a copy of training rows, and 2 are near copies; the comparison is too kind"],
        ),
        (Shared(40, 0, 1, 0), ["1 of 40 held-out chats is a near copy of training rows; the comparison is too kind"]),
        (Shared(40, 0, 0, 1), ["1 of 40 held-out chats asks what a training row asks"]),
        (Shared(4000, 0, 0, 1200), ["1,200 of 4,000 held-out chats ask what a training row asks"]),
        (
            Shared(4, 0, None, 0),
            ["near copies of training rows were not looked for among the held-out chats: there are too many rows"],
        ),
    ],
)
def test_what_was_found_is_said(shared: Shared, lines: list[str]) -> None:
    assert shared_sentences(shared.to_dict()) == lines


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert shared_sentences({}) == []
    assert not all_shared({})


def test_all_are_shared_where_each_is_a_copy_or_nearly_one() -> None:
    assert all_shared({"rows": 3, "copies": 2, "near_copies": 1, "same_prompt": 0})
    assert not all_shared({"rows": 3, "copies": 2, "near_copies": None, "same_prompt": 1})
