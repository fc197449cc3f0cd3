"""Runs beside one another."""

from __future__ import annotations

from pathlib import Path

import yaml

from phinetune.reporting import run_comparison as comparing
from phinetune.reporting.facts import RunFacts, read_runs
from phinetune.reporting.render import comparison_page
from reporting.report_helpers import DATA, EVALUATION, example, make_run


def two(folder: Path) -> list[RunFacts]:
    worse = {side: {**numbers, "loss": 1.0, "exact_match": 40.0} for side, numbers in EVALUATION.items()}
    more = [example(2), example(99)]
    paths = [make_run(folder / "good"), make_run(folder / "bad", evaluation=worse, examples=more)]
    tree = yaml.safe_load((folder / "bad" / "config.yaml").read_text())
    tree["peft_config"]["r"] = 64
    mark = (folder / "bad" / "config.yaml").read_text().splitlines(keepends=True)[0]
    (folder / "bad" / "config.yaml").write_text(mark + yaml.safe_dump(tree))
    return read_runs(paths)


def test_the_best_is_named_and_marked(tmp_path: Path) -> None:
    runs = two(tmp_path)
    assert comparing.headline(runs) == "good is best on the held-out chats: loss 0.0066, against 1.0000 (bad)."
    rows = {row.heading: row for row in comparing.result_rows(runs)}
    assert rows["exact match %"].best == [True, False]
    assert rows["chrF"].best == [False, False]  # equal


def test_runs_that_are_level_are_not_ranked(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / name) for name in ("a", "b")])
    assert comparing.headline(runs) == "2 runs side by side, level on the held-out chats: loss 0.0066."


def test_settings_that_differ_are_listed_and_no_others(tmp_path: Path) -> None:
    assert [(row.heading, row.values) for row in comparing.differing_settings(two(tmp_path))] == [
        ("peft_config.r", ["4", "64"])
    ]


def test_only_prompts_that_two_runs_answered_are_shown(tmp_path: Path) -> None:
    assert [one.prompt for one in comparing.shared_answers(two(tmp_path))] == ["Question 2?"]


def test_losses_on_different_chats_are_not_ranked(tmp_path: Path) -> None:
    other = {**DATA, "held_out": {**DATA["held_out"], "source": "other.jsonl"}}
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", data=other)])
    assert "different held-out chats" in comparing.headline(runs)


def test_runs_without_evaluation_are_compared_by_their_curves(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", 5, finished=False), make_run(tmp_path / "b", evaluation=None)])
    assert "fewer than two" in comparing.headline(runs)
    assert "No run was compared" in comparison_page(runs)
