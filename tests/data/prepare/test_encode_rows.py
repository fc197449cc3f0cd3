"""Each row has an outcome: ready-made rows as they stand, turns left out of the loss, reasons for the rest."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import chat
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.read.row import Row
from phinetune.engine.examples import Encoded

TOKENIZER = byte_tokenizer(300)
ENCODER = make_encoder(TOKENIZER)


def outcome(fields: dict[str, Any], max_length: int | None = None, **section: Any) -> RowOutcome:
    encoder = make_encoder(TOKENIZER, section.get("loss_on", "assistant"))
    return next(RowEncoder(DataSection(**section), encoder, max_length)([Row("a.jsonl:1", fields)]))


def trained(made: RowOutcome) -> str:
    assert made.encoded
    return str(TOKENIZER.decode([i for i in made.encoded.labels if i != -100]))


def test_text_is_taken_as_it_stands_and_ended() -> None:
    text = "<|user|>\nHi<|end|>\n<|assistant|>\nHo"
    made = outcome({"text": text})
    assert made.form == "text"
    assert made.encoded
    assert made.encoded.input_ids == TOKENIZER(text + "<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert made.encoded.labels == made.encoded.input_ids


def test_ids_above_a_gap_in_the_vocabulary_are_taken() -> None:
    sparse = byte_tokenizer(32064)
    top = max(sparse.get_vocab().values())
    assert top > len(sparse)
    rows = [Row("a:1", {"input_ids": [5, top]}), Row("a:2", {"input_ids": [5, top + 1]})]
    taken, refused = RowEncoder(DataSection(), make_encoder(sparse), None)(rows)
    assert taken.encoded == Encoded([5, top], [5, top])
    assert refused.error is not None


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<|endoftext|>"])
def test_text_that_ends_a_turn_is_not_ended_again(end: str) -> None:
    made = outcome({"text": "Once upon a time." + end})
    assert made.encoded
    assert made.encoded.input_ids == TOKENIZER("Once upon a time." + end, add_special_tokens=False)["input_ids"]


def test_a_rendered_chat_given_as_text_has_the_ids_of_the_chat() -> None:
    row = chat("Hi", "Ho", system="Be brief.")
    text = TOKENIZER.apply_chat_template(row["messages"], tokenize=False)
    from_text, from_chat = outcome({"text": text}), outcome(row)
    assert from_text.encoded
    assert from_chat.encoded
    assert from_text.encoded.input_ids == from_chat.encoded.input_ids


def test_ids_and_labels_are_taken_as_they_stand() -> None:
    made = outcome({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    assert (made.form, made.encoded) == ("tokens", Encoded([5, 6, 7], [-100, 6, 7]))
    whole = outcome({"input_ids": [5, 6, 7]})
    assert whole.encoded == Encoded([5, 6, 7], [5, 6, 7])


@pytest.mark.parametrize(
    ("fields", "words", "kind"),
    [
        ({"text": " \n"}, "`text` must be text, and not empty", "content"),
        ({"text": 3}, "`text` must be text", "content"),
        ({"text": "a\ud83d"}, "half a character", "letters"),
        ({"input_ids": []}, "list of whole numbers", "labels"),
        ({"input_ids": "1 2"}, "list of whole numbers", "labels"),
        ({"input_ids": [1, 2.0]}, "list of whole numbers", "labels"),
        ({"input_ids": [1, 300]}, "`input_ids` holds 300", "labels"),
        ({"input_ids": [-1, 3]}, "`input_ids` holds -1", "labels"),
        ({"input_ids": [1, 2], "labels": [1]}, "as long as `input_ids`", "labels"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "place 0 holds 2 beside id 1", "labels"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token to train on", "untrained"),
    ],
)
def test_ready_made_rows_that_cannot_be_right_are_refused(fields: dict[str, Any], words: str, kind: str) -> None:
    made = outcome(fields)
    assert made.error
    assert words in str(made.error)
    assert made.error.kind == kind
    assert made.encoded is None


@pytest.mark.parametrize("fields", [{"text": "long " * 20}, {"input_ids": [5] * 60}], ids=["text", "ids"])
def test_ready_made_rows_are_dropped_and_never_cut(fields: dict[str, Any]) -> None:
    made = outcome(fields, 50)
    assert (made.reason, made.error, made.cut) == ("longer than 50 tokens", None, False)


def left_out(row: dict[str, Any], *turns: int) -> dict[str, Any]:
    return {"messages": [{**m, "train": False} if i in turns else m for i, m in enumerate(row["messages"])]}


@pytest.mark.parametrize(
    ("loss_on", "turns", "wanted"),
    [
        ("assistant", (), "One.<|end|>Two.<|end|>Three.<|end|><|endoftext|>"),
        ("assistant", (3,), "One.<|end|>Three.<|end|><|endoftext|>"),
        ("assistant", (1, 5), "Two.<|end|>"),
        ("last", (1,), "Three.<|end|><|endoftext|>"),
        ("all", (3,), "<|user|>a<|end|><|assistant|>One.<|end|><|user|>b<|end|><|assistant|>"
         "<|user|>c<|end|><|assistant|>Three.<|end|><|endoftext|>"),
    ],
    ids=["none", "the second", "the first and the last", "last: the first", "all: the second"],
)  # fmt: skip
def test_turns_left_out_of_the_loss_have_no_labels(loss_on: str, turns: tuple[int, ...], wanted: str) -> None:
    row = chat("a", "One.", "b", "Two.", "c", "Three.")
    made, whole = outcome(left_out(row, *turns), loss_on=loss_on), outcome(row, loss_on=loss_on)
    assert trained(made) == wanted
    assert made.encoded
    assert whole.encoded
    assert made.encoded.input_ids == whole.encoded.input_ids


def test_a_chat_whose_every_turn_is_left_out_is_refused() -> None:
    assert str(outcome(left_out(chat("a", "b"), 1)).error) == "no token to train on"
    assert str(outcome(left_out(chat("a", "b", "c", "d"), 3), loss_on="last").error) == "no token to train on"


def test_a_cut_leaves_what_fits_and_says_so() -> None:
    row = chat("long " * 20, "b", "c", "d")
    made = outcome(row, 40)
    assert made.cut
    assert made.fitted == row["messages"][2:]
    assert made.chat == row["messages"]
    assert outcome(row, 40, overlong="drop").reason == "longer than 40 tokens"


def test_outcomes_come_in_order_whatever_becomes_of_the_rows() -> None:
    rows = [chat("a", "b"), {"nothing": 1}, {"text": "x"}, {"input_ids": [5]}, chat("c" * 90, "d" * 90), chat("e", "f")]
    numbered = [Row(f"a:{i}", fields) for i, fields in enumerate(rows)]
    made = list(RowEncoder(DataSection(), ENCODER, 60)(numbered))
    assert [one.row.where for one in made] == [f"a:{i}" for i in range(6)]
    assert [one.form for one in made] == ["messages", None, "text", "tokens", "messages", "messages"]
    assert [one.encoded is not None for one in made] == [True, False, True, True, False, True]
