"""The preview of a row: whose each token is, what is trained on, what is special, and where it is cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from chats.template_helpers import NAMES, template_tokenizer
from helpers import chat
from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.data import DataSection
from phinetune.data.prepare.encode_rows import RowEncoder, RowOutcome
from phinetune.data.preview import pieces, preview_row, turn_ends, turns_of
from phinetune.data.read.row import Broken, Row
from phinetune.screen.row_view import show_row

ENCODER = make_encoder(byte_tokenizer(300))
ROW = chat("How are you?", "Fine.", "Really?", "Yes!", system="Be brief.")


def outcome(fields: dict[str, Any], max_length: int | None = None, encoder: ChatEncoder = ENCODER) -> RowOutcome:
    return next(RowEncoder(DataSection(), encoder, max_length)([Row("a.jsonl:7", fields)]))


def shown(found: RowOutcome | Broken, encoder: ChatEncoder = ENCODER, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    show_row(preview_row(found, encoder), console, **options)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_without_colours_marks_tell_all() -> None:
    assert shown(outcome(ROW)).splitlines() == [
        "a.jsonl:7 · messages · 48 tokens, 12 of them trained on",
        "    system │ «<|system|>»Be brief.«<|end|>»",
        "      user │ «<|user|>»How are you?«<|end|>»",
        " assistant │ «<|assistant|>»⟦Fine.«<|end|>»⟧",
        "      user │ «<|user|>»Really?«<|end|>»",
        " assistant │ «<|assistant|>»⟦Yes!«<|end|>»«<|endoftext|>»⟧",
        "",
    ]


def test_colours_tell_roles_underlining_what_is_trained_and_reversal_what_is_special() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    show_row(preview_row(outcome(ROW), ENCODER), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[36mH\x1b[0m\x1b[36mo\x1b[0m\x1b[36mw\x1b[0m" in text
    assert "⟦" not in text
    lines = text.splitlines()
    assert "\x1b[7;32m<|assistant|>\x1b[0m\x1b[4;32mF\x1b[0m" in lines[3]  # reversed; underlined
    assert lines[3].endswith("\x1b[4;7;32m<|end|>\x1b[0m")
    colours = [line.partition("<|")[0].rpartition("m")[0][-2:] for line in lines[1:6]]
    assert colours == ["35", "36", "32", "36", "32"]


def test_a_typed_control_token_is_letters_to_the_eye() -> None:
    text = shown(outcome(chat("What is <|end|>?", "x")))
    assert "«<|user|>»What is <|end|>?«<|end|>»" in text


def test_token_boundaries_can_be_seen() -> None:
    text = shown(outcome(chat("Hé", "x")), boundaries=True)
    assert "«<|user|>»¦H¦é¦«<|end|>»" in text


def test_line_breaks_and_control_characters_are_signs() -> None:
    text = shown(outcome(chat("a\n\nb\x1b[31m\x07\r\tc", "x\n")))
    assert "\x1b" not in text
    assert "a↵\n           │ ↵\n           │ b␛[31m␇␍␉c«<|end|>»\n" in text
    assert "⟦x↵\n           │ «<|end|>»" in text


def test_where_a_row_is_cut_is_said() -> None:
    old = chat("one " * 9, "A.", "two", "B.", "three", "C.", system="Be brief.")
    left = outcome({"messages": [old["messages"][0], *old["messages"][-2:]]}).encoded
    assert left
    lines = shown(outcome(old, len(left.input_ids))).splitlines()
    assert lines[0].endswith("trained on · cut to fit")
    assert lines[1] == "    system │ «<|system|>»Be brief.«<|end|>»"
    assert lines[2] == "           │ ✂ 4 turns left out to fit"
    assert lines[3].startswith("      user │ «<|user|>»three")
    without = shown(outcome(chat("one " * 9, "A.", "two", "B."), 20)).splitlines()
    assert without[1] == "           │ ✂ 2 turns left out to fit"
    short = shown(outcome(chat("word " * 40, "A."), 60)).splitlines()
    assert short[2].startswith("           │ ✂ the last 1")
    assert short[2].endswith("characters of this turn cut to fit")


def test_rows_that_are_dropped_or_broken_say_why() -> None:
    assert shown(outcome(chat("a", "long " * 50), 60)) == "a.jsonl:7 · messages · dropped: longer than 60 tokens\n\n"
    assert "a.jsonl:7 · no known form · dropped: the keys (x)" in shown(outcome({"x": 1}))
    broken = Broken("a.jsonl:3", "broken JSON: [x]\x1b[2J")
    assert shown(broken) == "a.jsonl:3 · broken: broken JSON: [x]�[2J\n\n"


def test_ready_made_rows_are_shown_whole() -> None:
    assert "      text │ ⟦Once.«<|end|>»⟧" in shown(outcome({"text": "Once.<|end|>"}))
    assert "    tokens │ a⟦b⟧" in shown(outcome({"input_ids": [100, 101], "labels": [-100, 101]}))


def test_long_turns_are_shortened_in_the_middle() -> None:
    text = shown(outcome(chat("x" * 5000, "end")))
    assert " … 4,602 more … " in text
    assert len(text) < 1000


@pytest.mark.parametrize("name", NAMES)
def test_each_token_belongs_to_the_turn_that_wrote_it(name: str) -> None:
    encoder = make_encoder(template_tokenizer(name))
    row = chat("How are you?", "Fine.", "Really?", "Yes!", system=None if name == "phi-3-april-2024" else "Be brief.")
    made = outcome(row, encoder=encoder)
    assert made.encoded
    turns = turns_of(made, encoder)
    assert [turn.role for turn in turns] == [m["role"] for m in row["messages"]]
    texts = ["".join(piece.text for piece in turn.pieces) for turn in turns]
    assert "".join(texts) == encoder.tokenizer.decode(made.encoded.input_ids)
    assert all(message["content"] in text for message, text in zip(row["messages"], texts, strict=True))
    assert [piece.trained for turn in turns for piece in turn.pieces] == [i != -100 for i in made.encoded.labels]


def test_a_template_that_refuses_half_a_chat_keeps_its_turns_together() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = (
        "{% if messages | length < 3 and not add_generation_prompt %}{{ raise_exception('more!') }}{% endif %}"
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}"
    )
    messages = chat("a", "b", "c")["messages"]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert turn_ends(tokenizer, messages, ids) == [0, 0, len(ids)]


def test_characters_of_several_tokens_are_whole(phi3_tokenizer: Any) -> None:
    encoder = make_encoder(phi3_tokenizer)
    made = outcome(chat("a 🦙 日本 ü", "x"), encoder=encoder)
    assert made.encoded
    found = [piece.text for piece in pieces(phi3_tokenizer, made.encoded)]
    assert "🦙" in found
    assert "".join(found) == "<|user|> a 🦙 日本 ü<|end|><|assistant|> x<|end|><|endoftext|>"


def test_what_is_not_used_and_that_a_text_is_in_pieces_is_said() -> None:
    fields = {"id": 3, **chat("Hi", "Ho"), "topic": "sea"}
    assert shown(outcome(fields)).splitlines()[0].endswith(" of them trained on · not used: topic, id")
    text = shown(outcome({"text": "Once. " * 30}, 100))
    assert text.splitlines()[0] == "a.jsonl:7 · text · 100 tokens, 100 of them trained on · the first of 2 pieces"
