"""Each row has an outcome: ready-made rows as they stand, turns left out of the loss, reasons for the rest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from helpers import chat
from phinetune.chats.encoder import make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome, tag_of
from phinetune.data.prepare.report import DataReport
from phinetune.data.read.row import Row
from phinetune.engine.examples import Encoded
from phinetune.errors import ConfigError

TOKENIZER = byte_tokenizer(300)
ENCODER = make_encoder(TOKENIZER)


def outcome(fields: dict[str, Any], max_length: int | None = None, **section: Any) -> RowOutcome:
    encoder = make_encoder(TOKENIZER, section.get("loss_on", "assistant"))
    return next(RowEncoder(DataSection(**section), encoder, max_length)([Row("a.jsonl:1", fields)]))


def trained(made: RowOutcome) -> str:
    assert made.encoded
    return str(TOKENIZER.decode([i for i in made.encoded.labels if i != -100]))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", 1),
        ("<|user|>\nHi<|end|>", 1),
        ("<|end|>", 0),
        ("What is <|end|>?", 0),
    ],
)
def test_a_prompt_that_is_rendered_already_is_said(prompt: str, wanted: int) -> None:
    report = DataReport("a.jsonl")
    report.count(outcome({"prompt": prompt, "completion": "<|user|> <|end|>"}))
    assert sum("WARNING: prompts that hold this template's tokens" in line for line in report.lines()) == wanted


def test_padding_without_a_mask_is_said() -> None:
    padded = [*range(10, 20), *[0] * 20]
    for mask, wanted in ((None, 1), ([1] * 10 + [0] * 20, 0)):
        report = DataReport("a.jsonl")
        report.count(outcome({"input_ids": padded, "attention_mask": mask}))
        assert sum("WARNING: ids that begin or end with the same id" in line for line in report.lines()) == wanted


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


@pytest.mark.parametrize(
    ("fields", "overlong"),
    [({"text": "long " * 20}, "drop"), ({"input_ids": [5] * 60}, "cut")],
    ids=["text", "ids"],
)
def test_ready_made_rows_are_dropped_and_never_shortened(fields: dict[str, Any], overlong: str) -> None:
    made = outcome(fields, 50, overlong=overlong)
    assert (made.reason, made.error, made.cut) == ("longer than 50 tokens", None, False)


@pytest.mark.parametrize("overlap", [1, 7, 49])
def test_every_token_of_a_long_text_is_trained_on_once(overlap: int) -> None:
    text = " ".join(f"word {i}" for i in range(40))
    whole = TOKENIZER(text + "<|endoftext|>", add_special_tokens=False)["input_ids"]
    rows = [Row("a:1", {"text": text, "title": "t"}), Row("a:2", chat("a", "b"))]
    made = list(RowEncoder(DataSection(overlap=overlap), ENCODER, 50)(rows))
    pieces = [one.encoded for one in made[:-1] if one.encoded]
    assert [one.piece for one in made] == [*range(len(pieces)), 0]
    assert {one.pieces for one in made[:-1]} == {len(pieces)}
    assert all(len(piece.input_ids) == 50 for piece in pieces[:-1])
    assert [i for piece in pieces for i in piece.labels if i != -100] == whole
    assert all(piece.labels[:overlap] == [-100] * overlap for piece in pieces[1:])
    for before, after in pairwise(pieces):
        assert before.input_ids[-overlap:] == after.input_ids[:overlap]
    report = DataReport("a")
    for one in made:
        report.count(one)
    assert (report.rows, report.kept, report.in_pieces, report.pieces) == (2, 2, 1, len(pieces))
    assert dict(report.forms) == {"text": 1, "messages": 1}
    assert dict(report.unused) == {"title": 1}
    assert f"texts cut into pieces: 1, now {len(pieces)} examples" in "\n".join(report.lines())


def test_a_text_that_fits_is_one_piece() -> None:
    made = outcome({"text": "x" * 49}, 50)
    assert (made.pieces, made.encoded and len(made.encoded.input_ids)) == (1, 50)


def test_an_overlap_without_room_for_new_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.overlap: 50 .* less than training_config.max_length \(50\)"):
        RowEncoder(DataSection(overlap=50), ENCODER, 50)


class Rated(RowEncoder):
    """Reads a column of its own."""

    uses = ("rating",)


def test_columns_that_the_run_uses_are_not_told() -> None:
    row = Row("a:1", {**chat("a", "b"), "rating": 3, "kind": "x", "left": "y"})
    (plain,) = RowEncoder(DataSection(), ENCODER, None)([row])
    (rated,) = Rated(DataSection(tag="kind"), ENCODER, None)([row])
    assert plain.audit.unused == {"rating": False, "kind": True, "left": True}
    assert rated.audit.unused == {"left": True}


def test_a_system_text_that_is_to_be_dropped_is_told() -> None:
    encoder = make_encoder(TOKENIZER, "assistant", "drop")
    row = Row("a:1", chat("a", "b", system="Be kind."))
    (made,) = RowEncoder(DataSection(system="drop"), encoder, None)([row])
    assert made.audit.unused == {"system messages (data.system: drop)": True}
    (kept,) = RowEncoder(DataSection(), ENCODER, None)([row])
    assert kept.audit.unused == {}


def test_a_tag_that_is_null_is_an_empty_one() -> None:
    assert [tag_of(Row("a:1", fields), "kind") for fields in ({"kind": None}, {}, {"kind": 3})] == ["", "", "3"]


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


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1 // (m.content|length - 2)", "ZeroDivisionError: "),
        ("2.0 ** (m.content|length - 2 or 5000)", "OverflowError: "),
        ("(m.content[2:] or '{x}').format()", "KeyError: 'x'"),
        ("(m.content[2:] or '{}').format()", "IndexError: "),
        ("(1 if m.content|length == 2 else {})|dictsort", "AttributeError: "),
    ],
)
def test_a_chat_at_which_a_template_stumbles_is_refused_in_a_sentence(expression: str, words: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ " + expression + " }}{% endfor %}"
    rows = [Row("a", chat("What?", "Nothing.")), Row("b", chat("Hm", "Nothing."))]
    sound, refused = RowEncoder(DataSection(), make_encoder(tokenizer), None)(rows)
    assert sound.encoded
    assert refused.error
    assert str(refused.error).startswith(f"the chat template refuses it: {words}")
