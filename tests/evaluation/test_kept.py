"""What a tuned model kept: the shipped set, its bounds, the words, and the numbers of a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import chat, tiny_config, write_jsonl
from phinetune.api.evaluate import evaluate
from phinetune.api.train import train_config
from phinetune.config.evaluation import EvaluationSection
from phinetune.data.neutral.neutral_rows import shipped_prompts, shipped_rows
from phinetune.engine.scoring import score_rows
from phinetune.errors import DataError
from phinetune.evaluation.bootstrap import Pairs, differences
from phinetune.evaluation.kept import SHIPPED, answered_rows, kept_sentence, neutral_sets, scored_places
from phinetune.metric_table import measures_of
from phinetune.screen.console import Console


def test_the_shipped_set_is_spread_over_tags_and_its_patterns_match_its_answers() -> None:
    rows = shipped_rows()
    counts = Counter(row.tag for row in rows)
    assert counts.keys() == {"everyday", "knowledge", "arithmetic", "code", "chinese", "refusal"}
    assert min(counts.values()) >= 8
    assert {row.tag for row in rows[:12]} == counts.keys()
    for row in rows:
        assert row.expect is None or re.search(row.expect, row.messages[-1]["content"], re.IGNORECASE), row


def test_nothing_that_is_replayed_is_scored() -> None:
    prompts = shipped_prompts()
    assert len(set(prompts)) == len(prompts) >= 60
    assert not set(prompts) & {row.messages[0]["content"] for row in shipped_rows()}


def test_the_scored_tokens_are_bounded_and_never_too_few() -> None:
    assert scored_places([10] * 60, 10_000) == list(range(60))
    assert scored_places([10] * 60, 300) == list(range(30))
    assert scored_places([10] * 60, 0) == list(range(24))
    assert scored_places([10] * 3, 0) == [0, 1, 2]


def test_the_answered_rows_are_bounded_too_and_all_can_be_judged() -> None:
    rows = shipped_rows()
    assert len(answered_rows(rows, 0)) == 6
    assert len(answered_rows(rows, 10 * 4 * 32)) == 10
    assert all(row.expect for row in answered_rows(rows, 1e9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (0.5, "Forgotten: on 20 neutral chats the loss is worse by 0.5000"),
        (-0.5, "Kept: on 20 neutral chats nothing is lost; the loss is better by 0.5000"),
        (0.0, "Kept: on 20 neutral chats the loss shows no clear difference"),
    ],
)
def test_what_the_loss_says(change: float, words: str) -> None:
    base, ones = np.linspace(1, 2, 20), np.ones(20)
    wobble = 0.01 * np.where(np.arange(20) % 2, 1, -1)
    (loss,) = measures_of(["loss"])
    found = differences({"loss": (loss, Pairs(base, base + change + wobble, ones, ones))}, 20)
    assert kept_sentence(found["loss"], 20).startswith(words)


@pytest.mark.parametrize(
    ("tuned", "words"),
    [
        (
            np.linspace(1, 2, 20) + np.tile([3.0, -2.9], 10),
            "Can't be told: on 20 neutral chats the loss shows no clear",
        ),
        (np.full(20, np.nan), "Not finite: on 20 neutral chats"),
    ],
)
def test_what_is_not_known_is_not_called_kept(tuned: np.ndarray[Any, Any], words: str) -> None:
    (loss,) = measures_of(["loss"])
    found = differences({"loss": (loss, Pairs(np.linspace(1, 2, 20), tuned, np.ones(20), np.ones(20)))}, 20)
    assert kept_sentence(found["loss"], 20).startswith(words)


def test_a_users_own_set_comes_first_and_a_broken_one_is_told(tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "ours.jsonl", [{**chat("Who are you?", "A shop."), "expect": "shop"}])
    sets = neutral_sets(EvaluationSection(neutral=str(own)))
    assert list(sets) == [str(own), SHIPPED]
    assert [(row.tag, row.expect) for row in sets[str(own)]] == [("ours", "shop")]
    assert sets[SHIPPED] == list(shipped_rows())
    assert neutral_sets(EvaluationSection(neutral=False)) == {}
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"text": "no chat"}])
    pattern = write_jsonl(tmp_path / "pattern.jsonl", [{**chat("a", "b"), "expect": "("}])
    with pytest.raises(DataError, match=r"evaluation\.neutral") as caught:
        neutral_sets(EvaluationSection(neutral=[str(broken), str(pattern), str(tmp_path / "none.jsonl")]))
    told = str(caught.value)
    assert "pattern.jsonl:1: expect: '(' is no pattern" in told
    assert "none.jsonl" in told


def test_a_set_that_is_not_there_is_told_before_the_training(chats: Path, tmp_path: Path, console: Console) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.evaluation.enabled, config.evaluation.neutral = True, str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        train_config(config, console)
    assert not (tmp_path / "run").exists()


def test_a_large_set_of_ones_own_leaves_room_for_the_shipped_one(
    tiny_run: Path, tmp_path: Path, console: Console, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_jsonl(tmp_path / "ours.jsonl", [chat(f"Who are you, {i}?", "A shop.") for i in range(600)])
    with caplog.at_level("INFO"):
        found = evaluate(tiny_run, evaluation={"neutral": str(own)}, record=False, console=console)
    assert found.kept
    rows = {tag: part["rows"] for tag, part in found.kept["by_tag"].items()}
    assert rows.pop("ours") == 24
    assert sum(rows.values()) == 24
    assert found.kept["answers"] >= 6
    assert caplog.text.count("its first 24 chats are scored") == 1
    assert "500 are read at most" in caplog.text


def test_a_run_measures_base_and_tuned_and_keeps_it(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    kept = results["kept"]
    assert kept["rows"] >= 24
    assert kept["results"].keys() == {"base", "tuned"}
    assert kept["results"]["base"]["loss"] != kept["results"]["tuned"]["loss"]
    assert {"change", "low", "high", "verdict"} <= kept["differences"]["loss"].keys()
    assert sum(part["rows"] for part in kept["by_tag"].values()) == kept["rows"]
    assert 0 < kept["answers"] <= kept["rows"]
    assert "Answers right: " in kept["text"]
    assert "## Kept of the base" in (tiny_run / "README.md").read_text()
    assert "Answers right: " in (tiny_run / "README.md").read_text()
    assert "What was kept: neutral chats" in (tiny_run / "report.html").read_text()


def test_the_base_of_a_run_has_the_loss_of_the_plain_model(tiny_run: Path) -> None:
    """The numbers of `base` are those of the model without an adapter."""
    from phinetune.checkpoints.opened import open_model, opened_config

    opened = open_model(tiny_run, opened_config(tiny_run))
    kept = json.loads((tiny_run / "results.json").read_text())["kept"]
    rows = shipped_rows()[: kept["rows"]]
    encoded = opened.encoder.encode([opened.encoder.prepare(list(row.messages)) for row in rows])
    with opened.model.disable_adapter():
        scores = score_rows(opened.model, encoded, None, lambda count: None)
    loss = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
    assert kept["results"]["base"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_it_can_be_switched_off(tiny_run: Path, console: Console) -> None:
    found = evaluate(tiny_run, evaluation={"neutral": False, "generate": False}, record=False, console=console)
    assert found.kept is None
    assert "kept" not in found.to_tree()
