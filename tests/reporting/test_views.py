"""The tables of a run's page."""

from __future__ import annotations

from phinetune.data.prepare.report import DataReport
from phinetune.reporting.views import data_rows


def test_what_reached_no_model_stands_in_the_table_of_the_data() -> None:
    train, held_out = DataReport("a.jsonl"), DataReport("b.jsonl")
    train.count_audit({"topic": True, "id": False}, [], rows=1200)
    rows = dict(data_rows({"train": train.to_dict(), "held_out": held_out.to_dict()}))
    assert rows["columns not used"] == ["topic: 1,200, id: 1,200", ""]
    assert dict(data_rows({"train": {"rows": 3}}))["columns not used"] == [""]  # of an older run


def test_what_the_sets_share_is_no_set() -> None:
    facts = {
        "train": DataReport("a.jsonl").to_dict(),
        "held_out": None,
        "overlap": {"rows": 3, "copies": 1},
        "not_compared": "the held-out chats were not compared with the training rows, because the file is gone",
    }
    assert dict(data_rows(facts))["source"] == ["a.jsonl"]
