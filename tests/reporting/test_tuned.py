"""The picture of a race: lower losses are lower, larger rates are further right, and each look is a line."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from phinetune.reporting.render import write_tuned
from phinetune.reporting.tuned import headline, picture, table
from phinetune.run_folder import RunFolder
from phinetune.screen.tune import show_race


@pytest.fixture
def tree() -> dict[str, Any]:
    """Three rates, of which one was dropped at the first look and one had no number; then a rank."""
    rates = [(1e-3, {"2": 3.0, "6": 2.0}, "finished"), (5e-4, {"2": 3.5}, "dropped"), (2e-3, {"2": None}, "dropped")]
    candidates = [
        {"number": number, "values": {"learning_rate": rate}, "losses": losses, "state": state}
        for number, (rate, losses, state) in enumerate(rates)
    ]
    candidates.append(
        {"number": 3, "values": {"learning_rate": 1e-3, "r": 8}, "losses": {"6": 1.5}, "state": "running"}
    )
    rungs = [{"steps": 2, "keep": 2}, {"steps": 6, "keep": 1}]
    stages = [
        {"key": "learning_rate", "rungs": rungs, "winner": 0, "first": 0, "end": 3},
        {"key": "r", "rungs": rungs, "winner": None, "first": 3, "end": 4},
    ]
    why = ["learning_rate: 0.001 won a race of 3"]
    return {"why": why, "rows": 8, "held_out": 20, "stages": stages, "candidates": candidates}


def test_a_picture_has_a_line_for_each_look_at_the_rates(tree: dict[str, Any]) -> None:
    made = picture(tree)
    assert made
    first, last = made.looks
    assert [len(first.marks), len(last.marks)] == [2, 1], "no number, no mark; and the rank's candidate is not here"
    assert first.marks[0].x < first.marks[1].x
    assert first.marks[0].y < first.marks[1].y < last.marks[0].y
    assert [mark.won for mark in first.marks] == [False, True]
    assert last.marks[0].title == "0.001: 2.0000 after 6 steps"
    assert [text for _, text in made.x_ticks] == ["0.0005", "0.001"]


def test_one_rate_makes_no_picture(tree: dict[str, Any]) -> None:
    assert picture({**tree, "candidates": tree["candidates"][:1]}) is None
    assert picture({}) is None


def test_the_page_and_the_terminal_show_every_candidate(tree: dict[str, Any], tmp_path: Any) -> None:
    headings, rows = table(tree)
    assert headings == ["learning_rate", "r", "step 2", "step 6", ""]
    assert rows[2] == ("candidate 2", ["0.002", "", "not finite", "", "out"])
    assert headline(tree) == "learning_rate 0.001: the best of 4 candidates"
    RunFolder(tmp_path).write_tuned(tree)
    page = write_tuned(tmp_path).read_text()
    assert page.count("<polyline") == 2
    assert "won a race of 3" in page
    assert "data.test" in page
    file = io.StringIO()
    show_race(tree, Console(file=file, width=140))
    shown = file.getvalue()
    assert "not finite" in shown
    assert "best so far" in shown
    lines = {line.split("│")[1].strip(): line.count("━") for line in shown.splitlines() if "│" in line}
    assert lines["1"] > lines["0"] > lines["3"] > 0 == lines["2"]
