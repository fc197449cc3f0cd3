"""The sentences of a report: what is not used stands in one line, words first."""

from __future__ import annotations

import json

import pytest

from phinetune.data.prepare.report import COLUMNS_SHOWN, DataReport


def test_columns_with_words_come_first_and_each_stands_there_once() -> None:
    report = DataReport("a.jsonl")
    report.count_audit({"id": False, "topic": True}, [])
    report.count_audit({"id": False, "topic": False, "score": False}, [], rows=1200)
    assert report.unused_columns() == "topic (1,201), id (1,201), score (1,200)"
    assert report.lines()[1:] == ["  columns not used: topic (1,201), id (1,201), score (1,200)"]


def test_many_columns_are_counted() -> None:
    report = DataReport("a.jsonl")
    report.count_audit({f"c{i}": True for i in range(COLUMNS_SHOWN + 2)}, [])
    assert report.unused_columns().endswith("c29 (1), and 2 more")
    del report.unused["c0"], report.unused["c1"]
    assert report.unused_columns().endswith("c31 (1)")


@pytest.mark.parametrize("name", ["loss_mask", "turns[].train_on", "Weights"])
def test_what_seems_to_say_what_is_trained_comes_first(name: str) -> None:
    report = DataReport("a.jsonl")
    report.count_audit({"topic": True, "id": False, name: False}, [])
    assert report.unused_columns() == f"{name} (1), topic (1), id (1)"


def test_nothing_is_said_where_all_is_used() -> None:
    assert len(DataReport("a.jsonl").lines()) == 1


def test_a_report_can_be_kept_as_json() -> None:
    report = DataReport("a.jsonl")
    report.count_audit({"topic": True, "id": False}, ["nulls"], rows=3)
    kept = json.loads(json.dumps(report.to_dict()))
    assert (kept["unused"], kept["unused_values"], kept["notes"]) == ({"topic": 3}, {"id": 3}, {"nulls": 3})
