"""Rows that belong on one side: copies, near copies, answers to one question; and how many held-out rows are known."""

from __future__ import annotations

import random
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers import chat, write_jsonl
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare import build_sets, duplicates, near_copies, stream
from phinetune.data.prepare.build_sets import build_chats
from phinetune.data.prepare.chat_sets import Chats
from phinetune.data.prepare.copies import SetKeys, groups_of, keys_of
from phinetune.data.prepare.duplicates import Hashes, NearDuplicates
from phinetune.data.prepare.encode_rows import RowEncoder
from phinetune.data.prepare.near_copies import with_near
from phinetune.data.prepare.shared_rows import Shared, shared_sentences
from phinetune.data.read.row import Row
from phinetune.errors import DataError

ENCODER = make_encoder(byte_tokenizer(300))
DRAWN = random.Random(0)


def words(count: int = 60) -> str:
    """A text that is like no other."""
    return " ".join(str(DRAWN.randrange(10**6)) for _ in range(count))


def groups(rows: list[dict[str, Any]]) -> list[int]:
    outcomes = RowEncoder(DataSection(), ENCODER, None)(Row(f"a:{i}", row) for i, row in enumerate(rows))
    return groups_of(with_near(keys_of(list(outcomes))))


def build(file: Path, **section: Any) -> Chats:
    return build_chats(RowEncoder(DataSection(train=str(file), **section), ENCODER, None))


def single(count: int) -> list[dict[str, Any]]:
    return [chat(words(), words()) for _ in range(count)]


LONG = words()
TWINS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copies": (chat(LONG, "Yes."), chat(LONG, "Yes.")),
    "case and space": (chat("Is it far?", "Yes, very."), chat(" IS it  far?", "yes, VERY. ")),
    "another form": (chat("Far?", "Yes."), {"instruction": "Far?", "output": "Yes."}),
    "near copies": (chat("Tell me.", LONG), chat("Tell it.", f"{LONG} indeed")),
    "one question": (chat("Is it far?", "Yes."), chat("is it far?", "Not at all, if you like walking.")),
    "one question, then others": (chat("Far?", "Yes."), chat("Far?", "Yes.", "Very?", "No.")),
    "texts": ({"text": LONG}, {"text": f"{LONG}\n"}),
    "near texts": ({"text": LONG}, {"text": f"Now: {LONG}"}),
    "ids": ({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7]}),
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another system message": (chat("Far?", "Yes.", system="Be short."), chat("Far?", "Yes.", system="Be long.")),
    "one answer to two questions": (chat("Far?", "Yes."), chat("Near?", "Yes.")),
    "two texts": ({"text": "One text."}, {"text": "Other text."}),
    "other ids": ({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 8]}),
}


@pytest.mark.parametrize("pair", TWINS.values(), ids=TWINS)
def test_twins_are_one_group(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert groups([*single(9), *pair, *single(1)]) == [*range(10), 9, 11]


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_rows_that_are_not_alike_stand_alone(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert groups([*single(9), *pair]) == list(range(11))


def test_what_most_rows_share_is_the_form_of_the_task() -> None:
    rule = words(200)
    assert groups([chat("Classify.", f"Class {i}") for i in range(20)]) == list(range(20))
    assert groups([chat(f"Text {i}", f"Class {i}", system=rule) for i in range(20)]) == list(range(20))
    assert groups([{"text": f"{rule} {i}"} for i in range(20)]) == list(range(20))


def test_what_many_rows_share_beside_others_is_a_form_too() -> None:
    rows = [chat("Classify.", f"Class {i}") for i in range(12)] + [
        chat(f"Text {i}", "x", system=LONG) for i in range(12)
    ]
    assert groups([*rows, *single(6)]) == list(range(30))


def test_a_group_has_the_number_of_its_first_row() -> None:
    assert groups_of(SetKeys(["a", "b", "c", "d", "a"], [None, "x", None, None, "x"])) == [0, 0, 2, 3, 0]
    assert groups_of(SetKeys(["a", "b", "c", "a"], [None, "x", None, "x"])) == [0, 0, 2, 0]


def test_a_split_set_is_searched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    searched: list[int] = []

    class Counting(NearDuplicates):
        def add(self, number: int, mine: Hashes) -> int | None:
            searched.append(number)
            return super().add(number, mine)

    monkeypatch.setattr(near_copies, "NearDuplicates", Counting)
    build(write_jsonl(tmp_path / "a.jsonl", single(8)), eval=0.25)
    assert searched == list(range(8))


def test_copies_among_rows_of_one_form_are_found_all_the_same() -> None:
    rows = [chat(f"Text {i % 10}", f"Class {i % 10}", system=LONG) for i in range(20)]
    assert groups(rows) == [i % 10 for i in range(20)]


def test_a_few_rows_with_one_form_are_no_one_group() -> None:
    assert groups([chat(f"Text {i}", f"Class {i}", system=LONG) for i in range(4)]) == [0, 1, 2, 3]


def test_rows_that_can_not_be_used_belong_to_none() -> None:
    assert groups([{"nothing": 1}, {"nothing": 1}, *single(2)]) == [0, 1, 2, 3]


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on disk"])
def test_a_repeated_row_is_compared_once(large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if large:
        monkeypatch.setattr(build_sets, "SMALL", 2)
    train = [{"path": str(write_jsonl(tmp_path / "a.jsonl", single(4))), "weight": 5}]
    made = build_chats(RowEncoder(DataSection(train=train), ENCODER, None)).train
    assert (len(made), made.keys and len(made.keys.rows)) == (20, 4)


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("seed", range(3))
def test_a_share_parts_no_copies(seed: int, large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twelve chats, each of them twice: a plain draw parts some of them at every seed."""
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if large:
        monkeypatch.setattr(build_sets, "SMALL", 5)
    rows = [chat(f"question {i}", f"answer {i}") for i in range(12)]
    made = build(write_jsonl(tmp_path / "a.jsonl", [*rows, *rows]), eval=0.5, seed=seed)
    assert made.held_out
    assert (len(made.train), len(made.held_out)) == (12, 12)
    assert not {str(one) for one in made.train.chats} & {str(one) for one in made.held_out.chats}
    assert made.held_out.shared == Shared(12, 0, 0, 0)


def test_copies_of_one_row_can_not_be_parted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat("Hi", "Hello")] * 12)
    with pytest.raises(DataError, match="give held-out chats in a file"):
        build(file, eval=0.25)


@pytest.mark.parametrize("large", [False, True], ids=["in memory", "on disk"])
def test_a_share_parts_no_near_copies(large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if large:
        monkeypatch.setattr(build_sets, "SMALL", 5)
    texts = [words() for _ in range(12)]
    rows = [chat("Tell me.", text) for text in texts] + [chat("Tell it.", f"{text} indeed") for text in texts]
    made = build(write_jsonl(tmp_path / "a.jsonl", [*rows, *single(20)]), eval=0.5, seed=1)
    assert made.held_out
    sides = [
        {str(one[-1]["content"]).removesuffix(" indeed") for one in side.chats} & set(texts)
        for side in (made.train, made.held_out)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert made.held_out.shared == Shared(len(made.held_out), 0, 0, 0)


def test_all_held_out_rows_that_are_near_a_training_row_are_counted(tmp_path: Path) -> None:
    """Two of them are near copies of the training row, and none of each other."""
    row, other = words(100).split(), words(20).split()
    begins, ends = [*other[:7], *row[7:]], [*row[:-7], *other[7:14]]
    train = write_jsonl(tmp_path / "a.jsonl", [chat("Tell me.", " ".join(row)), *single(8)])
    held = [chat("Tell it.", " ".join(one)) for one in (begins, ends)]
    made = build(train, eval=str(write_jsonl(tmp_path / "h.jsonl", [*held, *single(3)])))
    assert made.held_out
    assert made.held_out.shared == Shared(rows=5, copies=0, near_copies=2, same_prompt=0)


def test_what_is_found_in_large_sets_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(near_copies, "LARGE", 10)
    searched: list[int] = []

    class Counting(NearDuplicates):
        def find_all(self, mine: Hashes, known: Container[int]) -> list[int]:
            searched.append(len(mine))
            return super().find_all(mine, known)

    monkeypatch.setattr(near_copies, "NearDuplicates", Counting)
    rows = single(10)
    train = write_jsonl(tmp_path / "a.jsonl", rows)
    near = [chat(one["messages"][0]["content"] + " Please.", one["messages"][1]["content"]) for one in rows[:2]]
    held = str(write_jsonl(tmp_path / "h.jsonl", near))
    found = [build(train, eval=held).held_out for _ in range(2)]
    assert [one and one.shared for one in found] == [Shared(2, 0, 2, 0)] * 2
    assert len(searched) == 10
    build(write_jsonl(tmp_path / "b.jsonl", single(10)), eval=held)
    assert len(searched) == 20


@pytest.mark.parametrize("large", ["", "train", "both"])
def test_held_out_rows_of_a_file_are_counted(large: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    if large:
        monkeypatch.setattr(build_sets, "SMALL", {"train": 9, "both": 5}[large])
    known = single(8)
    file = write_jsonl(tmp_path / "a.jsonl", [*known, chat("Is it far?", "Yes."), chat("Tell me.", LONG)])
    held = [*known[:3], chat("IS IT FAR?", "yes."), chat("Tell me.", f"{LONG} indeed"), chat("Is it far?", "No.")]
    made = build(file, eval=str(write_jsonl(tmp_path / "h.jsonl", [*held, *single(2)])))
    assert made.held_out
    assert made.held_out.shared == Shared(rows=8, copies=4, near_copies=1, same_prompt=1)
    assert made.facts()["overlap"] == {"rows": 8, "copies": 4, "near_copies": 1, "same_prompt": 1}


def test_rows_that_are_dropped_are_not_trained_on(tmp_path: Path) -> None:
    rows = [chat("q", "long " * 40), chat("p", "short")]
    file, other = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "h.jsonl", [*rows, chat("o", "so")])
    made = build_chats(RowEncoder(DataSection(train=str(file), eval=str(other)), ENCODER, 100))
    assert made.held_out
    assert made.held_out.shared == Shared(2, 1, 0, 0)


@pytest.mark.parametrize(
    ("of", "limit", "most"),
    [
        (near_copies, "NEAR_ROWS", 1),
        (near_copies, "NEAR_TRAINED", 9),
        (duplicates, "MAX_ROWS", 1),
        (duplicates, "MAX_SHINGLES", 9),
    ],
)
def test_near_copies_among_too_many_rows_are_not_looked_for(
    of: ModuleType, limit: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(of, limit, most)
    rows = single(10)
    made = build(write_jsonl(tmp_path / "a.jsonl", rows), eval=str(write_jsonl(tmp_path / "h.jsonl", rows[:2])))
    assert made.held_out
    assert made.held_out.shared == Shared(2, 2, None, 0)
    assert "too many rows" in shared_sentences(made.held_out.shared.to_dict())[-1]


def test_of_a_stream_the_first_rows_are_compared_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stream, "BATCH", 3)
    rows = single(5)
    held = write_jsonl(tmp_path / "h.jsonl", [rows[0], rows[4], *single(1)])
    made = build(write_jsonl(tmp_path / "a.jsonl", rows), eval=str(held), streaming=True)
    assert made.held_out
    assert made.held_out.shared == Shared(3, 1, 0, 0)
    told = "the held-out chats were compared with the first 3 training rows only, because the rest of a stream"
    assert made.facts()["not_compared"].startswith(told)
    assert "not_compared" not in build(tmp_path / "a.jsonl", eval=str(held)).facts()


@pytest.mark.parametrize("max_length", [None, 60])
def test_of_a_stream_dropped_rows_and_pieces_are_no_training_rows(tmp_path: Path, max_length: int | None) -> None:
    rows = [{"text": "long " * 40}, {"text": "short"}]
    file = str(write_jsonl(tmp_path / "a.jsonl", [*rows, chat("q", "much longer " * 40), chat("p", "short")]))
    section = DataSection(train=file, eval=str(write_jsonl(tmp_path / "h.jsonl", rows)), streaming=True)
    train = build_chats(RowEncoder(section, ENCODER, max_length)).train
    assert train.keys
    assert len(train.keys.rows) == train.report.kept
