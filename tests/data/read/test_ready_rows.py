"""Ready-made ids: padding is cut off, masks say what is trained on, and what contradicts itself is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phinetune.data.read.ready_rows import PADDING_IDS, read_ids, seems_padded
from phinetune.engine.examples import Encoded
from phinetune.errors import RowError

IDS = [5, 6, 7, 8]
NO = -100


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"attention_mask": [1, 1, 0, 0]}, Encoded([5, 6], [5, 6])),
        ({"attention_mask": [0, 0, 1, 1]}, Encoded([7, 8], [7, 8])),
        ({"attention_mask": [0, 1, 1, 0], "labels": [NO, NO, 7, NO]}, Encoded([6, 7], [NO, 7])),
        ({"attention_mask": [1, 1, 1, 0], "labels": [NO, 6, 7, 8]}, Encoded([5, 6, 7], [NO, 6, 7])),
        ({"attention_mask": [1, 1, 1, 0], "labels": [NO, 6, 7, 0]}, Encoded([5, 6, 7], [NO, 6, 7])),
        ({"attention_mask": [True, True, False, False]}, Encoded([5, 6], [5, 6])),
        ({"attention_mask": [1, 1, 1, 1]}, Encoded(IDS, IDS)),
        ({"attention_mask": None, "labels": None}, Encoded(IDS, IDS)),
        ({"completion_mask": None, "labels": [NO, 6, 7, 8]}, Encoded(IDS, [NO, 6, 7, 8])),
        ({"completion_mask": [0, 0, 1, 1]}, Encoded(IDS, [NO, NO, 7, 8])),
        ({"assistant_masks": [0, 1, 0, 1]}, Encoded(IDS, [NO, 6, NO, 8])),
        ({"loss_mask": [False, False, False, True]}, Encoded(IDS, [NO, NO, NO, 8])),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}, Encoded(IDS, [NO, 6, NO, 8])),
        ({"completion_mask": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 0]}, Encoded([5, 6, 7], [NO, NO, 7])),
        ({"completion_mask": [0, 0, 1, 1], "labels": [NO, NO, 7, 8]}, Encoded(IDS, [NO, NO, 7, 8])),
        ({"completion_mask": [0, 0, 1, 1], "labels": [NO, NO, 7, NO], "attention_mask": [1, 1, 1, 0]},
         Encoded([5, 6, 7], [NO, NO, 7])),
    ],
)  # fmt: skip
def test_padding_is_cut_off_and_masks_say_what_is_trained_on(more: dict[str, Any], wanted: Encoded) -> None:
    assert read_ids({"input_ids": IDS, **more}, 300) == wanted
    cells = {key: json.dumps(value) for key, value in more.items() if value and type(value[0]) is int}
    assert read_ids({"input_ids": json.dumps(IDS), **more, **cells}, 300) == wanted  # as in a CSV file


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"attention_mask": [1, 0, 1, 1]}, "`attention_mask` is 0 in the middle of the row"),
        ({"attention_mask": [0, 1, 0, 1]}, "`attention_mask` is 0 in the middle of the row"),
        ({"attention_mask": [0, 0, 0, 0]}, "`attention_mask` holds nothing but 0"),
        ({"attention_mask": [1, 1, 1]}, "`attention_mask` must hold 1 or 0 for each of `input_ids` (4 of them)"),
        ({"attention_mask": [1, 1, 2, 0]}, "`attention_mask` must hold 1 or 0"),
        ({"attention_mask": [1, 1, 1.0, 0]}, "`attention_mask` must be a list of whole numbers"),
        ({"attention_mask": "1 1 1 0"}, "`attention_mask` must be a list of whole numbers"),
        ({"completion_mask": [0, 1]}, "`completion_mask` must hold 1 or 0"),
        ({"assistant_masks": 1}, "`assistant_masks` must be a list of whole numbers"),
        ({"completion_mask": [0, 0, 1, 1], "labels": IDS}, "`labels` and `completion_mask` say different things"),
        ({"loss_mask": [1, 1, 1, 1], "labels": [NO, 6, 7, 8]}, "`labels` and `loss_mask` say different things"),
        ({"attention_mask": [0, 1, 1, 1], "labels": [5, 6, 9, 8]}, "place 2 holds 9 beside id 7"),
    ],
)
def test_masks_that_cannot_be_right_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        read_ids({"input_ids": IDS, **more}, 300)
    assert words in str(caught.value)
    assert caught.value.kind == "labels"


PAD = [9] * PADDING_IDS


@pytest.mark.parametrize(
    ("row", "seems"),
    [
        ({"input_ids": [*IDS, *PAD]}, True),
        ({"input_ids": [*PAD, *IDS]}, True),
        ({"input_ids": [*IDS, *PAD], "labels": [NO, NO, 7, 8, *PAD]}, True),
        ({"input_ids": [*IDS, *PAD], "labels": [*IDS, *[NO] * PADDING_IDS]}, False),
        ({"input_ids": [*IDS, *PAD], "attention_mask": [1, 1, 1, 1, *[0] * PADDING_IDS]}, False),
        ({"input_ids": [*IDS, *PAD[1:]]}, False),
        ({"input_ids": PAD}, False),
    ],
    ids=["after", "before", "with labels", "without loss", "masked", "few", "nothing else"],
)
def test_padding_that_is_trained_on_is_noticed(row: dict[str, Any], seems: bool) -> None:
    assert seems_padded(read_ids(row, 300)) is seems
