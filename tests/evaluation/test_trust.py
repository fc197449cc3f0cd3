"""Rows that were trained on are counted apart, groups stay on one side, and few rows are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers import chat, tiny_config, write_jsonl
from phinetune.api.train import train_config
from phinetune.data.prepare.shared_rows import shared_sentences
from phinetune.errors import DataError
from phinetune.evaluation.trust import few_answers, few_rows
from phinetune.screen.console import Console
from phinetune.training.prepare import prepare_run, settle


def words(i: int) -> str:
    return " ".join(chr(97 + (i * k) % 26) * (2 + (i + k) % 5) for k in range(1, 40))


@pytest.mark.parametrize(("rows", "points"), [(2, 70), (12, 29), (29, 19)])
def test_few_rows_say_how_little_they_can_tell(rows: int, points: int) -> None:
    (sentence,) = few_rows(rows)
    assert f"only {rows} held-out chats" in sentence
    assert f"{points} points" in sentence
    assert few_rows(30) == []
    assert few_rows(1)[0].startswith("held-out chats: only 1, so no interval can be given, and nothing is proved")


def test_few_answers_are_told_where_the_rows_are_enough() -> None:
    (sentence,) = few_answers(500, 10)
    assert sentence.startswith("only 10 prompts that were answered: a share of right answers is known to 31 points")
    assert sentence.endswith("raise evaluation.max_prompts")
    assert few_answers(500, 30) == few_answers(10, 10) == few_answers(500, 0) == []


def test_few_prompts_and_few_rows_that_are_no_copies_are_flags_of_a_run(tmp_path: Path) -> None:
    train = [chat(words(i), f"Answer {i}.") for i in range(40)]
    config = tiny_config(write_jsonl(tmp_path / "train.jsonl", train), tmp_path / "run", max_steps=1)
    fresh = [chat(words(i), f"Answer {i}.") for i in range(40, 43)]
    config.data.eval = str(write_jsonl(tmp_path / "held.jsonl", [*train[:30], *fresh]))
    config.evaluation.neutral, config.evaluation.max_prompts = False, 5
    flags = train_config(config, Console(quiet=True)).results["flags"]
    assert [flag.partition(":")[0] for flag in flags if flag.startswith("only")] == [
        "only 3 held-out chats that are no copies",
        "only 5 prompts that were answered",
    ]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "only 5 prompts that were answered" in card
    assert "Tuned beside base: loss " in card
    assert "95% interval" in card


def test_copies_and_near_copies_are_counted_apart(tmp_path: Path) -> None:
    train = [chat(words(i), f"Answer {i}.") for i in range(20)]
    near = chat(words(3) + " please", "Answer 3.")
    fresh = [chat(words(i), f"Answer {i}.") for i in range(40, 45)]
    config = tiny_config(write_jsonl(tmp_path / "train.jsonl", train), tmp_path / "run", max_steps=3)
    config.data.eval = str(write_jsonl(tmp_path / "held.jsonl", [train[0], near, *fresh]))
    config.evaluation.neutral = False
    config.evaluation.max_prompts = None
    results = train_config(config, Console(quiet=True)).results
    overlap, unseen = results["data"]["overlap"], results["unseen"]
    assert (overlap["copies"], overlap["near_copies"]) == (1, 1)
    assert "copied" not in overlap
    assert unseen["rows"] == 5
    assert {side["prompts"] for side in unseen["evaluation"].values()} == {5}
    assert unseen["evaluation"]["base"]["labelled_tokens"] < results["evaluation"]["base"]["labelled_tokens"]
    assert unseen["differences"]["loss"]["rows"] == 5
    assert any(flag.startswith("on the 5 held-out chats that are no copies") for flag in results["flags"])
    assert any(flag.startswith("only 7 held-out chats") for flag in results["flags"])


def grouped(tmp_path: Path, **data: Any) -> Any:
    rows = [{**chat(words(i), f"Answer {i}."), "customer": i // 4} for i in range(40)]
    config = tiny_config(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    config.data = config.data.model_copy(update={"eval": 0.2, **data})
    return config


def customers(chats: Any) -> set[int]:
    return {int("".join(filter(str.isdigit, chat[-1]["content"]))) // 4 for chat in chats}


@pytest.mark.parametrize("small", [5000, 0])
def test_rows_of_a_group_stay_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("phinetune.data.prepare.build_sets.SMALL", small)
    sets = prepare_run(settle(grouped(tmp_path, group="customer"))).chats
    assert sets.held_out is not None
    assert len(sets.held_out) == 8
    assert not customers(sets.train.chats) & customers(sets.held_out.chats)
    assert "columns not used" not in "\n".join(sets.train.report.lines())
    alone = prepare_run(settle(grouped(tmp_path))).chats
    assert alone.held_out is not None
    assert customers(alone.train.chats) & customers(alone.held_out.chats)


def test_held_out_rows_of_groups_that_are_trained_on_are_told(tmp_path: Path) -> None:
    held = [{**chat(words(i), f"Answer {i}."), "customer": i} for i in (2, 9, 70)]
    config = grouped(tmp_path, group="customer", eval=str(write_jsonl(tmp_path / "held.jsonl", held)))
    sets = prepare_run(settle(config)).chats
    assert sets.held_out is not None
    assert sets.held_out.shared is not None
    assert sets.held_out.shared.same_group == 2
    assert any(
        "are of groups that are trained on (data.group)" in line
        for line in shared_sentences(sets.held_out.shared.to_dict())
    )


def test_a_column_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.group client: no row of .* has a column of that name; there are"):
        prepare_run(settle(grouped(tmp_path, group="client")))
