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
