"""A step whose loss stands far above those before it is kept, with the rows that caused it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers import chat, tiny_config, train_only, write_jsonl
from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.report import DataReport
from phinetune.engine.examples import Encoded
from phinetune.engine.packing import pack
from phinetune.training.curve_words import curve_words, read_course
from phinetune.training.spikes import is_spike, place_of, trained_places


def test_a_spike_stands_twice_and_a_nat_above_what_is_usual() -> None:
    assert is_spike(4.1, 2.0)
    assert not is_spike(3.9, 2.0)
    assert not is_spike(0.9, 0.1)
    assert not is_spike(float("inf"), 1.0)
    assert not is_spike(float("nan"), 1.0)


def test_rows_are_shown_from_their_own_tokens_whether_padded_packed_or_shared() -> None:
    common = list(range(100, 120))
    rows = [Encoded([*common, 1, 2, 3], [-100] * 21 + [2, 3]), Encoded([*common, 7, 8], [-100] * 21 + [8])]
    alone = Encoded([5, 6], [-100, 6])
    shared = [(tokens.tolist(), at) for tokens, at in trained_places(pack([*rows, alone], share=True))]
    assert sorted(shared) == [([1, 2, 3], 1), ([5, 6], 1), ([7, 8], 1)]
    (packed,) = trained_places(pack([rows[0]], share=True))
    assert (packed[0].tolist(), packed[1]) == (rows[0].input_ids, 21)
    padded = {
        "input_ids": torch.tensor([[5, 6, 0]]),
        "labels": torch.tensor([[-100, 6, -100]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    }
    ((tokens, at),) = trained_places(padded)
    assert (tokens.tolist(), at) == ([5, 6], 1)


def test_a_row_is_found_by_its_own_tokens() -> None:
    encoded = [Encoded(ids, ids) for ids in ([1, 2, 3], [1, 2, 4], [1, 2, 3], [9, 3])]
    chats = ChatSet([], encoded, DataReport("made"), where=["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"])
    assert place_of(chats, [1, 2, 4]) == "a.jsonl:2"
    assert place_of(chats, [4]) == "a.jsonl:2"  # its beginning is shared
    assert place_of(chats, [1, 2, 3]) == "a.jsonl:1 and 1 more"
    assert place_of(chats, [7]) is None
    assert place_of(ChatSet([], encoded, DataReport("stored")), [1, 2, 4]) is None


def test_a_run_names_the_odd_row_among_equal_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's head is random and frozen, so its losses lie close together, and the bar is set lower."""
    monkeypatch.setattr("phinetune.training.spikes.FACTOR", 1.05)
    monkeypatch.setattr("phinetune.training.spikes.LEAST", 0.3)
    rows = [chat("Hello there", "aaaa aaaa aaaa")] * 40
    rows[35] = chat("An odd one", "zqxj 0931 !?")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    schedule = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "learning_rate": 0.3}
    config = tiny_config(data, tmp_path / "run", max_steps=38, per_device_train_batch_size=1, **schedule)
    config.peft_config = {"r": 16, "lora_alpha": 64}
    config.data.eval = None
    train_only(config)
    (spike,) = [json.loads(line) for line in (tmp_path / "run" / "spikes.jsonl").read_text().splitlines()]
    assert spike["step"] == 36
    assert "An odd one" in spike["rows"][0]
    assert "zqxj" in spike["rows"][0]
    assert spike["places"] == [f"{data}:36"]
    assert (tmp_path / "run" / "spikes.jsonl").stat().st_mode & 0o077 == 0
    course = read_course(tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "spikes.jsonl", rows=40)
    told = next(words.text for words in curve_words(course) if words.kind == "spike")
    assert "step 36" in told
    assert f"Look at its rows: {data}:36: " in told
