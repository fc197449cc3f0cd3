"""Evaluations during training on some of the held-out rows: which ones, and that nothing else is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import chat, tiny_config, train_only, write_jsonl
from phinetune.planning.evaluations import evaluations_of
from phinetune.training.prepare import PreparedRun, SettledRun, prepare_run, settle
from phinetune.training.scored_rows import spread

TRAIN = [chat(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(120)]
HELD_OUT = [chat(f"What is {i} and {i + 1}?" + " Please!" * (i % 2), f"It is {2 * i + 1}.") for i in range(150)]


def test_the_rows_lie_evenly_in_whole_blocks() -> None:
    assert spread(10, 10, 2) is None
    assert spread(10, 12, 2) is None
    assert spread(10, 4, 2) == [0, 1, 4, 5]
    assert spread(10, 5, 2) == [0, 1, 2, 3, 6, 7]
    assert spread(9, 8, 4) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert spread(10, 1, 1) == [0]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("kind", ["fast", "plain"])
def test_an_evaluation_scores_these_rows_alone(kind: Any, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", TRAIN[:8])
    found = []
    for name, rows, wanted in (
        ("some", HELD_OUT[:20], 5),
        ("those", [HELD_OUT[i] for i in (0, 4, 8, 12, 16)], "auto"),
    ):
        config = tiny_config(train, tmp_path / name, eval_strategy="steps", eval_steps=2, max_steps=4)
        config.data.eval = str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        config.engine.kind = kind
        config.evaluation.rows_while_training = wanted  # type: ignore[assignment]
        made = train_only(config)
        found.append(losses(made.folder.path))
    assert len(found[0]) == 2
    assert found[0] == found[1]


def prepared(folder: Path, held_out: int, rows: Any = "auto", **training: Any) -> PreparedRun:
    return prepare_run(settled(folder, held_out, rows, **training))


def test_where_all_would_take_too_long_some_are_scored_and_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    run = prepared(tmp_path, 150)
    (choice,) = [one for one in run.choices if one.key == "evaluation.rows_while_training"]
    assert 32 <= choice.value < 80
    assert choice.why == "two evaluations of all 150 held-out chats would take over 15% of the time of training"
    assert run.config.evaluation.rows_while_training == choice.value
    assert (run.args.eval_strategy, run.args.load_best_model_at_end) == ("steps", True)
    assert run.scored
    assert len(run.scored) == choice.value
    looks = evaluations_of(run, run.steps, None, 2)
    assert 2 <= looks.count <= 10
    report = run.chats.held_out.report  # type: ignore[union-attr]
    assert looks.tokens < report.tokens
    assert looks.count * looks.tokens / 3 < 0.2 * run.steps.tokens


@pytest.mark.parametrize(
    ("held_out", "rows", "training", "scored", "strategy"),
    [
        (20, "auto", {}, None, "steps"),  # there is time for all
        (150, "auto", {"eval_strategy": "steps", "eval_steps": 5}, None, "steps"),  # who says how often gets all
        (150, "auto", {"max_steps": 20}, None, "no"),  # too short a run for as many as would tell anything
        (150, 40, {}, 40, "steps"),
        (150, 500, {"eval_strategy": "steps", "eval_steps": 5}, None, "steps"),
    ],
)
def test_all_are_scored_where_there_is_time_or_somebody_says_so(
    tmp_path: Path, held_out: int, rows: Any, training: dict[str, Any], scored: int | None, strategy: str
) -> None:
    run = prepared(tmp_path, held_out, rows, **training)
    assert run.args.eval_strategy == strategy
    assert (run.scored and len(run.scored)) == scored
    assert not any(one.key.startswith("evaluation.") for one in run.choices)


def settled(folder: Path, held_out: int, rows: Any = "auto", **training: Any) -> SettledRun:
    config = tiny_config(write_jsonl(folder / "train.jsonl", TRAIN), folder / "run")
    config.data.eval = str(write_jsonl(folder / "held.jsonl", HELD_OUT[:held_out]))
    config.evaluation.rows_while_training = rows
    config.training_config = {"output_dir": str(folder / "run"), **training}
    return settle(config)


def test_what_was_chosen_stays_when_the_run_goes_on(tmp_path: Path) -> None:
    chosen = prepared(tmp_path, 150).chosen
    longer = settled(tmp_path, 150, num_train_epochs=30)  # there would be time for all
    assert prepare_run(longer).scored is None
    again = prepare_run(longer, {**chosen, "evaluation.rows_while_training": 48})
    assert again.scored
    assert len(again.scored) == 48
    for_all = {key: value for key, value in chosen.items() if not key.startswith("evaluation.")}
    assert prepare_run(settled(tmp_path, 150), for_all).scored is None


@pytest.mark.parametrize(
    ("training", "section"),
    [
        ({"eval_strategy": "steps"}, {}),
        ({"metric_for_best_model": "loss"}, {}),
        ({}, {"early_stopping_patience": 3}),
    ],
    ids=str,
)
def test_who_needs_evaluations_but_says_not_how_often_gets_a_part(
    tmp_path: Path, training: dict[str, Any], section: dict[str, Any]
) -> None:
    run = settled(tmp_path, 150, max_steps=20, **training)
    for key, value in section.items():
        setattr(run.config.evaluation, key, value)
    made = prepare_run(run)
    assert made.scored
    assert len(made.scored) == 32
    assert evaluations_of(made, made.steps, None, 2).count >= 3


def test_rows_lie_evenly_whatever_the_batch_of_evaluations(tmp_path: Path) -> None:
    run = prepared(tmp_path, 150, 10, per_device_eval_batch_size=64, eval_strategy="steps", eval_steps=5)
    assert run.scored == list(range(0, 150, 15))


def test_rows_that_no_evaluation_scores_get_a_line(tmp_path: Path) -> None:
    run = prepared(tmp_path, 20, 5, eval_strategy="no")
    line = "evaluation: `rows_while_training` has no effect: training_config.eval_strategy is `no`"
    assert line in run.settings.notes
