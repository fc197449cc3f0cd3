"""The held-out chats of a run: the very rows of the training, and what they were not compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import TINY, chat, tiny_config, train_only, write_jsonl
from phinetune.api import held_out
from phinetune.api.held_out import chats_of, held_out_chats
from phinetune.checkpoints.opened import opened_config
from phinetune.config.run import make_config
from phinetune.data.prepare import build_sets
from phinetune.errors import DataError

OTHERS = [chat("Something else?", "No."), chat("And this?", "Yes.")]


def run_on(file: Path, folder: Path, **data: Any) -> Path:
    config = tiny_config(file, folder, max_steps=1)
    config.data = config.data.model_copy(update=data)
    train_only(config)
    return folder


def turned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows[::-1]


def edited(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same letters in every chat in another order, so that every count stays."""
    return [chat(*(one["content"][::-1] for one in row["messages"])) for row in rows]


def moved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows[3:], *rows[:3]]


@pytest.mark.parametrize("change", [turned, edited, moved])
def test_a_share_of_other_rows_with_the_same_counts_is_refused(
    tmp_path: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [chat(f"What is {i}?", f"It is no {i}.") for i in range(9)]
    file = write_jsonl(tmp_path / "a.jsonl", own)
    run = run_on(file, tmp_path / "run")
    config = opened_config(run)
    assert held_out_chats(config, run)
    write_jsonl(file, change(own))
    with pytest.raises(DataError, match="held_out: as many rows and tokens as then, but others"):
        held_out_chats(config, run)
    start = json.loads((run / "start.json").read_text())
    del start["decides"]  # as older runs have it
    (run / "start.json").write_text(json.dumps(start))
    monkeypatch.setattr(held_out, "rows_digest", lambda _: pytest.fail("the rows were hashed for nothing"))
    assert held_out_chats(config, run)


@pytest.mark.parametrize("change", [turned, edited, lambda rows: rows[1:]])
def test_a_held_out_file_that_has_changed_is_told(chats: Path, tmp_path: Path, change: Any, caplog: Any) -> None:
    file = write_jsonl(tmp_path / "h.jsonl", OTHERS)
    run = run_on(chats, tmp_path / "run", eval=str(file))
    config = opened_config(run)
    assert held_out_chats(config, run)
    assert "not the chats" not in caplog.text
    write_jsonl(file, change(OTHERS))
    found = held_out_chats(config, run)
    assert found
    assert f"{file}: these are not the chats that the run was measured on in training (held_out: " in caplog.text


def not_compared(train: Any, held: Path, **data: Any) -> str | None:
    config = make_config({"model": {"path": TINY}, "data": {"train": train, **data}})
    found = chats_of(config, str(held))
    assert found.shared is None
    return found.not_compared


def test_rows_that_are_not_compared_are_told_with_the_reason(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = write_jsonl(tmp_path / "h.jsonl", OTHERS)
    said = "the held-out chats were not compared with the training rows, because"
    assert not_compared(None, held) is None  # of a model alone there are none
    assert not_compared([str(chats), "gone.jsonl"], held) == f"{said} gone.jsonl is gone"
    assert not_compared("some/set", held) == f"{said} some/set is no file or folder on this disk"
    assert not_compared("some/set", held, streaming=True) == f"{said} some/set is no file or folder on this disk"
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    told = not_compared(str(broken), held)
    assert told
    assert told.startswith(f"{said} these can't be read: {broken}:1: broken JSON")
    monkeypatch.setattr(build_sets, "SMALL", 3)
    monkeypatch.setattr(held_out, "SMALL", 3)
    assert not_compared(str(chats), held) == f"{said} these are more than 3"


def test_the_first_rows_of_a_stream_are_compared(chats: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    held = write_jsonl(tmp_path / "h.jsonl", [*OTHERS, rows[0]])
    config = make_config({"model": {"path": TINY}, "data": {"train": str(chats), "streaming": True}})
    found = chats_of(config, str(held))
    assert found.shared
    assert found.shared.copies == 1
    assert found.not_compared
    assert "with the first 12 training rows only" in found.not_compared


@pytest.mark.parametrize("key", ["split", "name"])
def test_the_split_of_the_training_rows_is_not_asked_of_a_file(tmp_path: Path, key: str) -> None:
    held = write_jsonl(tmp_path / "h.jsonl", OTHERS)
    config = make_config({"model": {"path": TINY}, "data": {"train": "some/set", key: "test", "eval": str(held)}})
    assert len(chats_of(config, str(held))) == 2
    found = held_out_chats(config, tmp_path)
    assert found
    assert len(found) == 2
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        chats_of(config, [str(held), "nowhere.jsonl"])
