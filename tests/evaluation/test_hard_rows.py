"""What was learnt worst: kinds that stand out are found and named, others are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from phinetune.data.prepare.chat_sets import ChatSet
from phinetune.data.prepare.report import DataReport
from phinetune.engine.examples import Encoded
from phinetune.engine.scoring import Score
from phinetune.evaluation.hard_rows import hard_kinds, hard_rows, length_kinds, script_of
from phinetune.evaluation.prompt_groups import prompt_groups


def scores(losses: list[float], seed: int = 0) -> list[Score]:
    rng = np.random.default_rng(seed)
    return [Score(float(loss * 10 * (1 + 0.1 * rng.normal())), 5, 10) for loss in losses]


def set_of(prompts: list[str], tags: list[str] | None = None) -> ChatSet:
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in prompts]
    rows = [Encoded([1] * (5 + i % 3), [-100, *[1] * (4 + i % 3)]) for i in range(len(prompts))]
    where = [f"held.jsonl:{i + 1}" for i in range(len(prompts))]
    places = list(range(len(prompts)))
    return ChatSet(chats, rows, DataReport("made"), places, tags or [], where)  # type: ignore[arg-type]


def test_a_kind_that_stands_out_is_named_with_its_worst_rows() -> None:
    tags = ["refund" if i % 4 == 0 else "order" for i in range(40)]
    prompts = [f"About {tag} number {i}" for i, tag in enumerate(tags)]
    tuned = scores([2.0 if tag == "refund" else 1.0 for tag in tags])
    found = hard_rows(scores([3.0] * 40), tuned, set_of(prompts, tags), before=scores([2.5] * 40))
    assert found is not None
    worst = found["kinds"][0]
    assert (worst["by"], worst["name"], worst["rows"]) == ("tag", "refund", 10)
    assert 0.6 < worst["low"] < worst["above"] < worst["high"] < 1.4
    assert worst["base"] > worst["loss"]
    assert 0.3 < worst["last_doubling"] < 0.7
    assert all("refund" in row["prompt"] for row in worst["examples"])
    assert all(row["prompt"] == prompts[int(row["place"].split(":")[1]) - 1] for row in worst["examples"])
    assert found["text"].startswith("Learnt worst: tag: refund (10 rows): loss 1.9")
    json.dumps(found)


def test_rows_that_are_all_alike_give_no_kind() -> None:
    tags = ["a" if i % 2 else "b" for i in range(60)]
    found = hard_rows(scores([2.0] * 60), scores([1.0] * 60, seed=3), set_of(["What is it?"] * 60, tags))
    assert found is not None
    assert found["kinds"] == []
    assert found["text"].startswith("No kind of rows is learnt clearly worse than the others (by tag, length")


def test_few_rows_say_nothing_and_few_of_a_kind_are_not_judged() -> None:
    assert hard_rows(scores([2.0] * 19), scores([1.0] * 19), set_of(["?"] * 19)) is None
    tags = ["rare" if i < 4 else "often" for i in range(30)]
    tuned = scores([5.0 if i < 4 else 1.0 for i in range(30)])
    assert hard_kinds(scores([6.0] * 30), tuned, {"tag": tags}, ["?"] * 30) == []


def test_the_same_rows_are_one_kind_and_numbers_that_are_not_finite_are_none() -> None:
    marks = ["x" if i < 10 else "y" for i in range(30)]
    tuned = scores([3.0 if i < 10 else 1.0 for i in range(30)])
    found = hard_kinds(tuned, tuned, {"tag": marks, "length": [mark * 2 for mark in marks]}, ["?"] * 30)
    assert [one.called for one in found] == ["tag: x"]
    broken = [Score(float("nan"), 0, 10), *tuned[1:]]
    assert hard_kinds(broken, broken, {"tag": marks}, ["?"] * 30) == []


def test_scripts_are_told_by_letters() -> None:
    assert script_of("Guten Tag, schöner Ort") == "Latin letters"
    assert script_of("Привет, мир, and you") == "Cyrillic letters"
    assert script_of("请用中文回答 OK") == "Chinese or Japanese"
    assert script_of("これは日本語です") == "Japanese"
    assert script_of("한국어 문장") == "Korean"
    assert script_of("नमस्ते दुनिया") == "Devanagari letters"
    assert script_of("12 + 3 = 15") is None


def test_lengths_are_thirds() -> None:
    assert set(length_kinds(list(range(1, 31)))) == {"up to 10 tokens", "11 to 20 tokens", "over 20 tokens"}
    assert len(set(length_kinds([7] * 20))) == 1


def test_prompts_that_speak_of_like_things_are_one_group() -> None:
    topics = (
        "refund money invoice {} paid twice",
        "tent poles broken {} replace the tent",
        "warranty boots leather {} years",
    )
    prompts = [topics[i % 3].format(f"case{i}") for i in range(45)]
    groups = prompt_groups(prompts)
    for topic in range(3):
        assert len({groups[i] for i in range(topic, 45, 3)}) == 1
    assert len(set(groups)) == 3
    assert set(str(groups[0]).split(", ")) < {"refund", "money", "invoice", "paid", "twice"}
    assert groups == prompt_groups(prompts)


def test_prompts_without_anything_between_them_are_in_no_group() -> None:
    assert prompt_groups(["Hello there"] * 12) == [None] * 12  # too few
    assert set(prompt_groups(["the same words"] * 40)) == {None}  # the form of the task
    assert set(prompt_groups([""] * 40)) == {None}
    chinese = prompt_groups(["退款发票问题" if i % 2 else "帐篷杆子坏了" for i in range(40)])
    assert len({one for one in chinese if one}) == 2


def test_a_run_of_few_held_out_rows_has_no_such_part(tiny_run: Path) -> None:
    assert "hard" not in json.loads((tiny_run / "results.json").read_text())
