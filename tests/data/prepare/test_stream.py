"""Streams: the rows of the set, encoded as they come, refused where they can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from helpers import chat, tiny_config, train_only, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import stream
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.engine.packing import fill_rows
from phinetune.errors import ConfigError, DataError

ENCODER = make_encoder(byte_tokenizer(300))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stream, "DRAWN_FROM", 8)
    monkeypatch.setattr(stream, "BATCH", 5)
    return write_jsonl(tmp_path / "many.jsonl", [chat(f"What is {i}?", f"It is {i}.") for i in range(30)])


def streamed(section: dict[str, Any]) -> Any:
    return build_chats(RowEncoder(DataSection(streaming=True, **section), ENCODER, None)).train


def test_a_stream_has_the_rows_of_the_set_drawn_among_neighbours(many: Path) -> None:
    rows = [row["input_ids"] for row in streamed({"train": str(many)}).dataset()]
    whole = [
        row.input_ids for row in build_chats(RowEncoder(DataSection(train=str(many)), ENCODER, None)).train.encoded
    ]
    assert sorted(rows) == sorted(whole)
    assert rows != whole
    assert rows == [row["input_ids"] for row in streamed({"train": str(many)}).dataset()]
    assert rows != [row["input_ids"] for row in streamed({"train": str(many), "seed": 1}).dataset()]
    assert len(list(streamed({"train": str(many), "limit": 7}).dataset())) == 7


def test_a_stream_is_told_by_its_first_rows(many: Path) -> None:
    made = streamed({"train": str(many)})
    assert made.report.rows == 5
    assert "(streamed; its first 5 rows)" in made.report.lines()[0]


@pytest.mark.parametrize("kind", ["saved by datasets", "files"])
def test_folders_stream_too(many: Path, tmp_path: Path, kind: str) -> None:
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    folder = tmp_path / "folder"
    if kind == "files":
        folder.mkdir()
        write_jsonl(folder / "a.jsonl", rows)
    else:
        Dataset.from_list(rows).save_to_disk(str(folder))
    assert list(streamed({"train": str(folder)}).dataset()) == list(streamed({"train": str(many)}).dataset())


@pytest.mark.parametrize(("line", "message"), [("{", "broken JSON"), ('{"nothing": 1}', "keys \\(nothing\\)")])
def test_a_row_that_cannot_be_used_is_named_when_it_comes(many: Path, line: str, message: str) -> None:
    lines = many.read_text().splitlines()
    many.write_text("\n".join([*lines[:20], line, *lines[20:]]))
    with pytest.raises(DataError, match=f"many.jsonl:21: .*{message}"):
        list(streamed({"train": str(many)}).dataset())


def test_what_takes_all_rows_at_once_is_refused(many: Path, tmp_path: Path, console: Console) -> None:
    with pytest.raises(ConfigError) as caught:
        streamed({"train": [{"path": str(many), "weight": 2}], "eval": 0.1})
    assert len(caught.value.problems) == 2
    config = tiny_config(many, tmp_path / "run", max_steps=-1)
    config.data.streaming, config.data.eval = True, None
    with pytest.raises(ConfigError, match="max_steps"):
        train_only(config)


def test_a_stream_fills_rows(many: Path) -> None:
    filled = list(fill_rows(streamed({"train": str(many)}).dataset(), 200))
    assert sum(len(row["seq_lengths"]) for row in filled) == 30
    assert max(len(row["input_ids"]) for row in filled) <= 200


@pytest.mark.parametrize("kind", ["fast", "plain"])
def test_a_run_trains_on_a_stream_and_goes_on_to_the_bit(
    many: Path, chats: Path, tmp_path: Path, console: Console, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    for name, steps in (("whole", [20]), ("parts", [12, 20])):
        for n, most in enumerate(steps):
            settings = {"save_strategy": "steps", "save_steps": 12, "lr_scheduler_type": "constant"}
            config = tiny_config(many, tmp_path / f"{kind}-{name}", **settings, max_steps=most)
            config.data.streaming, config.data.eval, config.engine.kind = True, str(chats), kind
            made = train_only(config, resume=n > 0, changed=n > 0)
        assert made.summary["steps"] == 20, name  # more than one time through
        file = made.folder.metrics.read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in file])
    assert losses[0] == losses[1]
    assert caplog.text.count("a stream is compared by its first 5 rows") == 1  # where it goes on


def test_what_needs_all_rows_at_once_is_refused(many: Path) -> None:
    section = DataSection.model_validate(
        {"train": [{"path": str(many), "weight": 2}], "eval": 0.1, "train_share": 0.5, "streaming": True}
    )
    with pytest.raises(ConfigError) as caught:
        stream.check_stream(section)
    told = " ".join(caught.value.problems)
    assert [key in told for key in ("data.eval: 0.1", "data.train: a stream", "data.train_share: a share")] == [
        True
    ] * 3
