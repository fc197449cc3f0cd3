"""Whose answers tell how far the model has moved: those of a row's group, to other prompts wherever there are any."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from datasets import Dataset

from phinetune.config.objective import ObjectiveSection
from phinetune.engine.examples import IGNORED
from phinetune.training.objectives.kto import ROOMY, Neighbours
from phinetune.training.objectives.registry import make_objective


def rows(form: str) -> list[dict[str, Any]]:
    """Rows of a prompt and an answer, one token each: `p` is the first answer of a pair, `q` its second, `s` alone."""
    return [
        {"input_ids": [100 + i - (kind == "q"), i], "labels": [IGNORED, i], "second": float(kind == "q")}
        for i, kind in enumerate(form)
    ]


@pytest.mark.parametrize(
    ("form", "size", "wanted"),
    [
        ("ssss", 4, [3, 0, 1, 2]),
        ("pqpq", 4, [3, 2, 0, 1]),
        ("pqpqpq", 6, [5, 4, 0, 1, 2, 3]),
        ("sssss", 3, [2, 0, 1, 4, 3]),
    ],
)
def test_answers_move_on_by_a_row_behind_the_first_ones(form: str, size: int, wanted: list[int]) -> None:
    """As TRL has it for rows of which it has put all chosen answers before the rejected ones."""
    made = Neighbours(rows(form), size)
    assert [made.neighbour(place) for place in range(len(form))] == wanted
    assert [made[place]["input_ids"][-1] for place in range(len(form))] == wanted


@pytest.mark.parametrize("size", range(ROOMY, 9))
@pytest.mark.parametrize("form", ["pq" * 24, "s" + "pq" * 24, "spq" * 16, "pqs" + "pq" * 20, "ppqs" * 12])
def test_no_row_has_an_answer_to_its_own_prompt(form: str, size: int) -> None:
    """Nor does any answer stand twice in a group."""
    given = rows(form[: 2 * size])
    for made in (Neighbours(given, size), Neighbours(Dataset.from_list(given), size)):
        found = [made.neighbour(place) for place in range(len(given))]
        assert sorted(found) == list(range(len(given)))
        assert all(given[place]["input_ids"][0] != given[other]["input_ids"][0] for place, other in enumerate(found))


@pytest.mark.parametrize(("form", "size", "told"), [("pqpq", 2, True), ("ssss", 2, False), ("pqpq", 4, False)])
def test_micro_batches_too_small_for_pairs_are_told(
    form: str, size: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "phinetune"):
        make_objective(ObjectiveSection(kind="kto")).arranged(rows(form), size, None)
    assert ("a pair's answers have no neighbours but each other" in caplog.text) is told
