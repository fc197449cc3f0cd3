"""Answers of the base are mixed into the training rows, made once, and told."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from helpers import TINY, chat, tiny_config, write_jsonl
from phinetune.config.data import DataSection
from phinetune.config.model import ModelSection
from phinetune.data.neutral.neutral_rows import shipped_prompts
from phinetune.data.prepare.arrow_rows import StoredRows
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.report import DataReport, replay_sentence
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.errors import ConfigError
from phinetune.training.prepare import prepare_run, settle
from phinetune.training.replay import mixed, replay_examples
from phinetune.training.run import open_place, train_run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "data"


def test_the_share_of_answers_is_mixed_in_made_once_and_counted(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [chat(f"Is it {i}?", "Yes.") for i in range(20)])
    config = tiny_config(data, tmp_path / "run", max_steps=2)
    config.data.replay, config.data.eval = 0.2, None
    with caplog.at_level(logging.INFO):
        first = prepare_run(settle(config))
    assert len(first.chats.train) == 24
    assert first.chats.train.report.kept == 20
    mixed_in = first.chats.facts()["replay"]
    assert (mixed_in["rows"], mixed_in["prompts"]) == (4, 4)
    assert caplog.text.count("the base answers 4 neutral prompts") == 1
    (answers,) = cache.glob("*/answers.arrow")
    before = answers.stat().st_mtime_ns
    again = prepare_run(settle(config))
    assert answers.stat().st_mtime_ns == before
    assert [one.input_ids for one in again.chats.train.encoded] == [one.input_ids for one in first.chats.train.encoded]
    shown = first.tokenizer.decode(first.chats.train.encoded[20].input_ids)
    assert shipped_prompts()[0] in shown
    train_run(again, open_place(config))
    start = json.loads((tmp_path / "run" / "start.json").read_text())
    assert start["data"]["replay"] == mixed_in


def test_the_answers_are_those_that_the_base_gives(tmp_path: Path, cache: Path) -> None:
    from phinetune.checkpoints.load import load_base
    from phinetune.engine.generate import answer_prompts

    data = write_jsonl(tmp_path / "rows.jsonl", [chat("Is it?", "Yes.")] * 3)
    config = tiny_config(data, tmp_path / "run")
    config.data.replay, config.data.eval = 0.4, None
    run = prepare_run(settle(config))
    encoder = run.rows.encoder
    prompt = encoder.prompt_ids(encoder.prepare([{"role": "user", "content": shipped_prompts()[0]}]))
    base = load_base(ModelSection(path=TINY), fast=True).model
    (answer,) = answer_prompts(base, run.tokenizer, [prompt], max_new_tokens=128)
    row = run.chats.train.encoded[-1]
    trained = [label for label in row.labels if label != IGNORED]
    assert answer.text.strip()[:20] in str(run.tokenizer.decode(trained))


def test_the_end_of_an_answer_that_was_cut_is_not_trained(tmp_path: Path, cache: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [chat("Is it?", "Yes.")] * 3)
    config = tiny_config(data, tmp_path / "run")
    config.data.eval = None
    rows = prepare_run(settle(config)).rows
    whole, cut = replay_examples(rows, [("Hi", "Hello you", True), ("Hi", "Hello you", False), ("Hi", " ", True)])
    ends = rows.encoder.end_of_turn
    assert whole.input_ids == cut.input_ids
    assert any(label in ends for label in whole.labels)
    assert not any(label in ends for label in cut.labels)
    assert 0 < cut.trainable < whole.trainable


def test_rows_on_disk_get_the_answers_at_their_end() -> None:
    stored = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]], "length": [2]})
    made = mixed(ChatSet([], StoredRows(stored), DataReport("x"), tags=["a"]), [Encoded([3, 4, 5], [-100, 4, 5])])
    assert list(made.encoded) == [Encoded([1, 2], [-100, 2]), Encoded([3, 4, 5], [-100, 4, 5])]
    assert (made.lengths().tolist(), made.tags) == ([2, 3], ["a", ""])


def test_a_stream_takes_none(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "rows.jsonl", tmp_path / "run")
    write_jsonl(tmp_path / "rows.jsonl", [chat("Is it?", "Yes.")] * 3)
    config.data = DataSection(train=str(tmp_path / "rows.jsonl"), streaming=True, replay=0.1)
    with pytest.raises(ConfigError, match="can't be mixed into a stream"):
        settle(config)


def test_what_was_mixed_in_is_one_sentence() -> None:
    assert replay_sentence({"rows": 4, "prompts": 4, "tokens": 300}) == (
        "mixed in: 4 answers of the base to neutral prompts; 300 tokens"
    )
    assert "of 60 different prompts" in replay_sentence({"rows": 90, "prompts": 60, "tokens": 9_000})
