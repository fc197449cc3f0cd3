"""What was gained, in one sentence, for better or worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phinetune.reporting.facts import read_run
from phinetune.reporting.headline import headline
from phinetune.run_folder import RunFolder
from reporting.report_helpers import BASE, DATA, DIFFERENCES, EVALUATION, TUNED, example, make_run


def told(folder: Path, **results: Any) -> str:
    return headline(read_run(make_run(folder, **results)))


def test_a_gain_is_told_with_its_interval(tmp_path: Path) -> None:
    assert told(tmp_path / "a") == (
        "Better on 80 held-out chats: exact match rose from 0.0% to 96.2%, loss fell from 2.5 to 0.0066."
    )
    assert "to 96.2% (95% interval +91.2 to +100.0), loss" in told(tmp_path / "b", differences=DIFFERENCES)


SHARED = {"rows": 80, "copies": 12, "near_copies": 0, "same_prompt": 0}


def test_rows_that_were_trained_on_are_told_with_the_gain(tmp_path: Path) -> None:
    some = told(tmp_path / "a", data={**DATA, "overlap": SHARED})
    assert some.startswith("Better on 80 held-out chats: ")
    assert some.endswith(". 12 of 80 held-out chats are copies of training rows; the comparison is too kind.")
    every = told(tmp_path / "b", data={**DATA, "overlap": {**SHARED, "copies": 78, "near_copies": 2}})
    assert every.startswith(
        "78 of 80 held-out chats are copies of training rows, and 2 are near copies; the comparison is too kind. On "
        "them: better on 80 held-out chats: exact match rose"
    )
    asked = told(tmp_path / "c", data={**DATA, "overlap": {**SHARED, "copies": 0, "same_prompt": 1}})
    assert asked.endswith(". 1 of 80 held-out chats asks what a training row asks.")
    assert "chats are" not in told(tmp_path / "d", data={**DATA, "overlap": None})


def test_a_later_evaluation_is_told_with_its_own_overlap(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluation=None, data={**DATA, "overlap": SHARED})
    later = {"evaluation": EVALUATION, "data": {"held_out": {"kept": 3}, "overlap": {**SHARED, "rows": 3, "copies": 1}}}
    RunFolder(run).write_evaluation(later)
    assert headline(read_run(run)).endswith(
        "1 of 3 held-out chats is a copy of training rows; the comparison is too kind."
    )


def test_a_loss_is_told_as_one(tmp_path: Path) -> None:
    swapped = {"base": EVALUATION["tuned"], "tuned": EVALUATION["base"]}
    assert told(tmp_path / "a", evaluation=swapped).startswith(
        "Worse on 80 held-out chats: exact match fell from 96.2%"
    )
    mixed = {"base": EVALUATION["base"], "tuned": {**EVALUATION["tuned"], "loss": 3.0}}
    assert told(tmp_path / "b", evaluation=mixed).startswith("Mixed on")


def test_a_change_within_chance_is_no_gain(tmp_path: Path) -> None:
    unclear = {key: {"low": -1.0, "high": 2.0, "verdict": "no clear difference"} for key in ("exact_match", "loss")}
    assert told(tmp_path / "run", differences=unclear).startswith("No clear difference on 80")


def test_an_interval_that_could_not_be_had_is_left_out(tmp_path: Path) -> None:
    without = {"exact_match": {"low": float("nan"), "high": None, "verdict": "better"}}
    assert "interval" not in told(tmp_path / "run", differences=without)


def test_fewer_prompts_than_chats_are_told(tmp_path: Path) -> None:
    few = {side: {**numbers, "prompts": 24} for side, numbers in EVALUATION.items()}
    assert "chats: on 24 answered prompts exact match rose" in told(tmp_path / "run", evaluation=few)


def test_without_answers_the_token_accuracy_stands_in(tmp_path: Path) -> None:
    assert "token accuracy rose from 46.9% to 99.8%" in told(
        tmp_path / "run", evaluation={"base": BASE, "tuned": TUNED}
    )


@pytest.mark.parametrize(
    ("steps", "finished", "words"),
    [
        (30, True, "over 30 steps; it was not compared"),
        (12, False, "in 12 of 30 steps; the run was stopped"),
        (0, False, "Nothing was measured"),
    ],
)
def test_a_run_without_comparison_tells_of_its_training(tmp_path: Path, steps: int, finished: bool, words: str) -> None:
    assert words in headline(read_run(make_run(tmp_path / "run", steps, finished, evaluation=None)))


def test_a_later_evaluation_stands_in_where_the_run_made_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", evaluation=None, examples=None)
    later = {"data": {"held_out": {"source": "x", "kept": 5}}, "evaluation": EVALUATION, "examples": [example()]}
    RunFolder(folder).write_evaluation(later)
    run = read_run(folder)
    assert headline(run).startswith("Better on 5 held-out chats")
    assert len(run.examples) == 1


@pytest.mark.parametrize(
    ("side", "key", "name"),
    [
        ("tuned", "loss", "loss"),
        ("base", "loss", "loss"),
        ("tuned", "token_accuracy", "token accuracy"),
        ("tuned", "my_score", "my score"),
    ],
)
def test_a_number_that_is_not_finite_is_told_first(tmp_path: Path, side: str, key: str, name: str) -> None:
    spoiled = {**EVALUATION, side: {**EVALUATION[side], key: None}}
    sentence = told(tmp_path / "run", evaluation=spoiled)
    assert sentence.startswith(f"Not finite on 80 held-out chats: {name} of {side} is not finite, exact match rose")
