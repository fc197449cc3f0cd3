"""The sets of the benchmark of data curves: enough rows, the same ones every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.curve_sets import ALPACA, HELD_OUT, SETS, TRAIN, write_set


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_its_rows_and_they_are_the_same_every_time(name: str, tmp_path: Path) -> None:
    if name == "alpaca" and not ALPACA.is_file():
        pytest.skip(f"no {ALPACA}")
    texts = [[file.read_text() for file in write_set(name, tmp_path / again)] for again in ("a", "b")]
    assert texts[0] == texts[1]
    assert [len(text.splitlines()) for text in texts[0]] == [TRAIN, HELD_OUT]
    rows = [json.loads(line)["messages"] for line in texts[0][0].splitlines()]
    assert all(len(row) == 2 and row[0]["content"] and row[1]["content"] for row in rows)
    assert len({row[1]["content"] for row in rows}) > 1
