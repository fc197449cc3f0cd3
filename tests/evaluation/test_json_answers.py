"""JSON in answers: what counts as valid, and which fields are right."""

from __future__ import annotations

import pytest

from phinetune.evaluation.json_answers import field_shares, fields, fields_right, valid

REFERENCE = 'Sorry!\n{"order": "7", "item": {"name": "tent", "count": 2}, "gift": true}'


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ('{"a": 1}', '{"a": 2}', 100),
        ("[1, 2]", "[]", 100),
        ('Here: {"a": 1}', '{"a": 2}', 0),
        ('Here: {"a": 1}', REFERENCE, 100),
        ('{oh {"a": 1} more', REFERENCE, 100),
        ('```json\n{"a": 1}\n```', REFERENCE, 100),
        ('Sorry! {"order": "7", "item": ', REFERENCE, 0),
        ("7", REFERENCE, 0),
        ("", REFERENCE, 0),
        ("[" * 100_000, REFERENCE, 0),
        ('{"a": 1}', "no JSON here", None),
        ("7", "7", None),
    ],
    ids=[
        "object",
        "list",
        "words around it, and none in the reference",
        "words around it, as in the reference",
        "after an open bracket",
        "in a code fence",
        "cut off",
        "a number",
        "empty",
        "too deep",
        "no JSON in the reference",
        "a number as the reference",
    ],
)
def test_valid(answer: str, reference: str, wanted: float | None) -> None:
    assert valid(answer, reference) == wanted


def test_fields_are_compared_one_by_one_nested_ones_too() -> None:
    answer = 'Hi. {"order": "7", "item": {"name": "tent", "count": 3}, "gift": 1, "more": 0}'
    assert fields_right(answer, REFERENCE) == {"order": True, "item.name": True, "item.count": False, "gift": False}
    assert fields(answer, REFERENCE) == 50
    assert fields(REFERENCE, REFERENCE) == 100
    assert fields("nothing", REFERENCE) == 0
    assert fields("[1]", REFERENCE) == 0
    assert fields(answer, "nothing") is None


def test_shares_by_field_count_the_references_that_have_it() -> None:
    pairs = [('{"a": 1}', '{"a": 1, "b": 2}'), ('{"a": 0}', '{"a": 1}'), ("", "words")]
    assert field_shares(pairs) == {"a": 50, "b": 0}
