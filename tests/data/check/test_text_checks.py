"""Turns and letters: what stands out, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from data.check.check_helpers import ENCODER
from helpers import chat
from phinetune.data.check.text_checks import (
    call_troubles,
    letter_troubles,
    markup_troubles,
    repair,
    text_troubles,
    turn_troubles,
)

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def turns(*pairs: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more} for role, content, more in ((*pair, {})[:3] for pair in pairs)]


USER, ANSWER = ("user", "Well, how far is it?"), ("assistant", "Five miles, more or less.")


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        (turns(USER, ANSWER), []),
        (turns(("system", "Be brief."), USER, ANSWER, ("user", "And back?"), ("assistant", "The same.")), []),
        (turns(("user", " \n"), ANSWER), [("empty_turn", "turn 1 (user)")]),
        (turns(("system", ""), USER, ANSWER), [("empty_turn", "turn 1 (system)")]),
        (turns(("system", "", {"tools": [{}]}), USER, ANSWER), []),
        (turns(USER, ("assistant", "")), [("empty_answer", "turn 2")]),
        (turns(USER, ("assistant", "", {"train": False})), []),
        (turns(USER, ("assistant", "", {"tool_calls": [CALL]}), ("tool", "5"), ANSWER), []),
        (turns(USER, ("assistant", USER[1])), [("repeated_turn", "turn 2 says the same as turn 1")]),
        (turns(USER, ANSWER, ("user", "And?"), ANSWER), [("repeated_turn", "turn 4 says the same as turn 2")]),
        (turns(USER, ("assistant", "Yes."), ("user", "And?"), ("assistant", "Yes.")), []),
        (turns(USER, ("user", "Well?"), ANSWER), [("order", "turns 1 and 2 are both the user's")]),
        (turns(USER, ANSWER, ("assistant", "Or six.")), [("order", "turns 2 and 3 are both the assistant's")]),
        (turns(USER, ("tool", "5"), ANSWER), [("order", "turn 2 is a tool's, and no tool call comes before it")]),
        (turns(("system", "x"), ANSWER), [("order", "turn 2 answers no question")]),
        (turns(USER, ANSWER, ("user", "So?")), [("order", "the last turn is the user's, and nothing answers it")]),
    ],
    ids=[
        "question and answer",
        "system message and two exchanges",
        "empty question",
        "empty system message",
        "system message that carries tools",
        "empty answer",
        "empty answer without loss",
        "tool call without words",
        "answer that repeats the question",
        "long answer twice",
        "short answer twice",
        "two questions in a row",
        "two answers in a row",
        "tool turn without a call",
        "answer without a question",
        "question without an answer",
    ],
)
def test_turns(messages: list[dict[str, Any]], wanted: list[tuple[str, str]]) -> None:
    assert list(turn_troubles(messages)) == wanted


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        (chat("a < b | c > d", "<b>bold</b>"), []),
        (chat("What is <|end|>?", "x"), [("typed_token", "turn 1: <|end|>")]),
        (chat("x", "so<|end|>\n<|user|>\nthen"), [("answer_markup", "turn 2: <|end|> <|user|>")]),
        (chat("<|user|>\nx<|end|>\n<|assistant|>\n", "y"), [("rendered", "turn 1: <|user|> <|end|> <|assistant|>")]),
        (chat(" <|user|>\nx<|end|>\n", "y"), [("rendered", "turn 1: <|user|> <|end|>")]),
        (chat("<|user|> is what?", "y"), [("typed_token", "turn 1: <|user|>")]),
        (chat("Is <|user|> before <|end|>", "y"), [("typed_token", "turn 1: <|user|> <|end|>")]),
        (chat("[INST] x [/INST]", "y"), [("foreign_markup", "turn 1: [INST] [/INST]")]),
        (chat("x", "y<|eot_id|>"), [("foreign_markup", "turn 2: <|eot_id|>")]),
    ],
    ids=[
        *("none", "typed token", "rendered answer", "rendered prompt", "rendered turn", "begins with a token"),
        *("ends with a token", "Llama 2's", "Llama 3's"),
    ],
)
def test_markup(messages: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert list(markup_troubles(messages["messages"], ENCODER)) == wanted


def garbled(text: str, encoding: str = "cp1252") -> str:
    return text.encode().decode(encoding, "replace")


@pytest.mark.parametrize(
    ("text", "wanted", "repaired"),
    [
        ("simple\ttext\r\n", [], "simple\ttext\r\n"),
        ("Größe, naïve “quotes”, 日本語, ответ, 🙂 👩‍👩‍👧", [], None),
        ("Ça coûte 5 € à l’Élysée", [], None),
        ("bell\x07 and \x1b[31mred\x00", ["control"], "bell and [31mred"),
        ("turned\u202e round\u2066", ["control"], "turned round"),
        ("mark\ufeff inside", ["control"], "mark inside"),
        ("Gr\ufffd\ufffde", ["replaced"], None),
        (garbled("Größe und Äpfel"), ["mojibake"], "Größe und Äpfel"),
        (garbled("it’s naïve – “so”".replace("”", "“")), ["mojibake"], None),
        (garbled("Größe", "latin-1"), ["mojibake"], "Größe"),
    ],
    ids=[
        "ASCII",
        "other languages and emoji",
        "French",
        "control characters",
        "reading direction",
        "byte order mark",
        "lost letters",
        "garbled German",
        "garbled quotes",
        "garbled by Latin-1",
    ],
)
def test_letters(text: str, wanted: list[str], repaired: str | None) -> None:
    assert [kind for kind, _ in letter_troubles(text)] == wanted
    kinds = {kind for kind in wanted if kind != "replaced"}
    if repaired is not None:
        assert repair(text) == (repaired, kinds)
    elif not wanted:
        assert repair(text) == (text, set())


def test_hidden_letters_are_named() -> None:
    assert list(letter_troubles("a\x00b\x00c\x07\x1b\x0b")) == [("control", "5 (U+0000, U+0007, U+001B, …)")]


def test_calls_tools_and_answers_belong_together() -> None:
    def called(name: str, **more: Any) -> dict[str, Any]:
        return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}, **more}]}

    head = ("system", "", {"tools": [{"type": "function", "function": {"name": "f"}}]})
    sound = turns(head, USER, ("assistant", "", called("f", id="1")), ("tool", "5", {"tool_call_id": "1"}), ANSWER)
    assert list(call_troubles(sound)) == []
    assert list(call_troubles(turns(USER, ("assistant", "", called("f"))))) == []  # the call is what is learnt
    assert list(call_troubles([])) == []
    other = turns(head, USER, ("assistant", "", called("g", id="1")), USER, ("tool", "5", {"tool_call_id": "2"}))
    assert [detail for _, detail in call_troubles(other)] == [
        "turn 3 calls `g`, which is not among the row's tools",
        "turn 3 calls a tool, and no answer follows",
        "turn 5 answers a call that no turn makes",
    ]


def test_a_ready_made_text_may_hold_its_own_templates_tokens_only() -> None:
    assert list(text_troubles("<|user|>Hi<|end|><|assistant|>Ho<|end|>", ENCODER)) == []
    assert list(text_troubles("[INST] Hi [/INST]<|im_end|>", ENCODER)) == [
        ("foreign_markup", "[INST] [/INST] <|im_end|>")
    ]
