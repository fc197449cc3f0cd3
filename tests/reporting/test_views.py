"""The tables of a run's page."""

from __future__ import annotations

from phinetune.data.prepare.report import DataReport
from phinetune.reporting.views import class_tables, data_rows, result_rows
from reporting.report_helpers import CLASSES, OWN, OWN_EVALUATION


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


def test_classes_have_a_table_and_a_matrix_for_each_model() -> None:
    (tables,) = class_tables({"classes": CLASSES})
    assert tables.headings[:3] == ["prompts", "precision %, base", "precision %, tuned"]
    assert tables.rows[0] == ("billing", ["20", "50.0", "50.0", "20.0", "95.0", "40.0", "40.0"])
    assert tables.columns == ["billing", "delivery", "returns and much else", "none of them"]
    (_, base), (_, tuned) = tables.matrices
    assert [(cell.text, cell.level) for cell in base[0][1]] == [("4", 1), ("3", 1), ("3", 1), ("10", 2)]
    assert [(cell.text, cell.level) for cell in tuned[0][1]] == [("19", 2), ("1", 0), ("0", 0), ("0", 0)]
    assert class_tables({}) == []


def test_own_measures_have_their_direction_and_as_many_decimals_as_they_need() -> None:
    rows = {row.heading: row for row in result_rows({"evaluation": OWN_EVALUATION, "own": OWN})}
    assert rows["topic macro-F1 %"].bar == (31.2, 95.0)
    edits = rows["edits ↓"]
    assert (edits.values, edits.change, edits.verdict) == (["0.812", "0.250"], "−0.562", "better")
