"""Every form of preferences that other tools write, read row by row."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phinetune.config.row_forms import JUDGED_FORMS, PAIR_FORMS
from phinetune.data.read.preferences import _READERS, read_preference
from phinetune.errors import RowError


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


ASKED, YES, NO = turn("user", "Why?"), turn("assistant", "So."), turn("assistant", "No.")
EARLIER = [turn("user", "Hi"), turn("assistant", "Ho")]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]

# Rows of pairs; all of them say: ASKED, and YES is better than NO.
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl, explicit, conversational": ("pair", {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]}),
    "trl, implicit, conversational": ("pair", {"chosen": [ASKED, YES], "rejected": [ASKED, NO]}),
    "trl, explicit, plain": ("pair", {"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
    "trl, implicit, plain": ("pair", {"chosen": "Why? So.", "rejected": "Why? No."}),
    "as JSON text, of a CSV": ("pair", {"chosen": json.dumps([ASKED, YES]), "rejected": json.dumps([ASKED, NO])}),
    "anthropic": (
        "pair",
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    ),
    "ultrafeedback, binarized": (
        "pair",
        {
            **{"prompt": "Why?", "prompt_id": "7", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
            **{"messages": [ASKED, YES], "score_chosen": 8.0, "score_rejected": 2.0},
        },
    ),
    "messages beside answers": ("pair", {"messages": [ASKED], "chosen": YES, "rejected": NO}),
    "ultrafeedback": (
        "pair_ultrafeedback",
        {
            "instruction": "Why?",
            "completions": [
                {"model": "a", "response": "Um.", "overall_score": 5.0},
                {"model": "b", "response": "No.", "overall_score": 1.0},
                {"model": "c", "response": "So.", "overall_score": 9.0},
            ],
        },
    ),
    "argilla": ("pair_responses", {"instruction": "Why?", "chosen_response": "So.", "rejected_response": "No."}),
    "openai": (
        "pair_openai",
        {"input": {"messages": [ASKED]}, "preferred_output": [YES], "non_preferred_output": [NO]},
    ),
    "llama-factory, sharegpt": (
        "pair_conversations",
        {"conversations": [said("human", "Why?")], "chosen": said("gpt", "So."), "rejected": said("gpt", "No.")},
    ),
    "llama-factory, alpaca": (
        "pair_alpaca",
        {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No."},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row"), PAIRS.values(), ids=PAIRS)
def test_each_form_of_pairs_is_found_and_read(form: str, row: dict[str, Any]) -> None:
    found, read = read_preference(row)
    assert found == form
    assert read.prompt == [ASKED]
    assert [(answer.messages, answer.liked) for answer in read.answers] == [([YES], True), ([NO], False)]


JUDGED: dict[str, tuple[str, dict[str, Any]]] = {
    "trl": ("judged", {"prompt": [ASKED], "completion": [YES], "label": True}),
    "trl, plain": ("judged", {"prompt": "Why?", "completion": "So.", "label": "false"}),
    "messages": ("judged_messages", {"messages": [ASKED, YES], "label": 1}),
    "kto_tag, sharegpt": (
        "judged_conversations",
        {"conversations": [said("human", "Why?"), said("gpt", "So.")], "kto_tag": False},
    ),
    "kto_tag, alpaca": ("judged_alpaca", {"instruction": "Why?", "output": "So.", "kto_tag": "true"}),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row"), JUDGED.values(), ids=JUDGED)
def test_each_form_of_judged_answers_is_found_and_read(form: str, row: dict[str, Any]) -> None:
    found, read = read_preference(row, judged=True)
    assert found == form
    assert read.prompt == [ASKED]
    assert [answer.messages for answer in read.answers] == [[YES]]
    assert read.answers[0].liked is (row.get("label", row.get("kto_tag")) in (True, 1, "true"))
    with pytest.raises(RowError, match="which objective: kto learns from"):
        read_preference(row)


def test_a_pair_is_two_judged_answers_too() -> None:
    assert [answer.liked for answer in read_preference(PAIRS["openai"][1], judged=True)[1].answers] == [True, False]


def test_every_form_of_the_table_is_read() -> None:
    assert set(_READERS) == {form.name for form in (*PAIR_FORMS, *JUDGED_FORMS)}
    assert {form for form, _ in PAIRS.values()} == {form.name for form in PAIR_FORMS}
    assert {form for form, _ in JUDGED.values()} == {form.name for form in JUDGED_FORMS}


def test_earlier_turns_system_and_tools_stand_before_both_answers() -> None:
    """The turns before the answers carry no loss, whoever said them."""
    row = {"system": "Be brief.", "tools": TOOLS, "chosen": [*EARLIER, ASKED, YES], "rejected": [*EARLIER, ASKED, NO]}
    read = read_preference(row)[1]
    assert [message["role"] for message in read.prompt] == ["system", "user", "assistant", "user"]
    assert read.prompt[0]["content"] == "Be brief."
    assert read.prompt[0]["tools"] == TOOLS
    for chat, last in zip(read.chats(), (YES, NO), strict=True):
        assert chat[-1] == last
        assert chat[2] == {**EARLIER[1], "train": False}


def test_openais_tools_stand_in_its_input() -> None:
    row = {**PAIRS["openai"][1], "input": {"messages": [ASKED], "tools": TOOLS, "parallel_tool_calls": True}}
    assert read_preference(row)[1].prompt[0]["tools"] == TOOLS


def test_answers_may_have_several_turns() -> None:
    """The first answers differ; what follows belongs to each."""
    more = [turn("user", "And?"), turn("assistant", "That's all.")]
    read = read_preference({"chosen": [ASKED, YES, *more], "rejected": [ASKED, NO]})[1]
    assert [len(answer.messages) for answer in read.answers] == [3, 1]


@pytest.mark.parametrize(
    ("row", "words", "kind"),
    [
        ({"chosen": [ASKED, YES], "rejected": [turn("user", "How?"), NO]}, "no prompt in common", "prompts"),
        ({"prompt": "How?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]}, "say different things", "prompts"),
        ({"chosen": "So.", "rejected": "No."}, "no beginning in common", "prompts"),
        ({"prompt": [ASKED], "chosen": [YES], "rejected": []}, "`rejected` is empty", "form"),
        ({"prompt": [ASKED], "chosen": [YES], "rejected": None}, "`rejected` is empty", "content"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": 5}, "`rejected` must be a list of turns", "form"),
        ({"prompt": "Why?", "answer": "So."}, "are those of no known form", "form"),
        ({"prompt": [ASKED, YES], "chosen": [YES], "rejected": [NO]}, "no question stands before", "roles"),
        ({"instruction": "Why?", "completions": [{"response": "So."}]}, "needs two answers or more", "content"),
    ],
)  # fmt: skip
def test_what_is_no_preference_is_said(row: dict[str, Any], words: str, kind: str) -> None:
    with pytest.raises(RowError, match=words) as caught:
        read_preference(row)
    assert caught.value.kind == kind


def test_a_label_that_is_neither_is_refused() -> None:
    with pytest.raises(RowError, match="`label` must be true or false, not 'maybe'"):
        read_preference({"prompt": "Why?", "completion": "So.", "label": "maybe"}, judged=True)


@pytest.mark.parametrize(
    "answer",
    ["Try Human: A History.", "Two plays:\nHuman: a farce\nAssistant: a tragedy", "- Assistant: who helps"],
    ids=["in a line", "at a line's begin", "in a list"],
)
@pytest.mark.parametrize("gap", ["\n\n", "\n\n\n"])
def test_who_speaks_within_an_answer_begins_no_turn(answer: str, gap: str) -> None:
    """Turns of Anthropic's texts begin behind a blank line."""
    chat = f"{gap}Human: What is good?{gap}Assistant: "
    read = read_preference({"chosen": chat + answer, "rejected": f"{chat}Nothing."})[1]
    assert read.prompt == [turn("user", "What is good?")]
    assert [one.messages for one in read.answers] == [[turn("assistant", answer)], [turn("assistant", "Nothing.")]]


@pytest.mark.parametrize(("value", "liked"), [(1.0, True), (0.0, False), (-1.0, False), (True, True), (0, False)])
def test_a_number_says_whether_an_answer_is_good(value: float, liked: bool) -> None:
    row = {"prompt": "Why?", "completion": "So.", "label": value}
    assert read_preference(row, judged=True)[1].answers[0].liked is liked


@pytest.mark.parametrize("value", [0.5, 2.0, float("nan"), float("inf"), "perhaps", None])
def test_a_label_that_says_neither_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match="`label` must be true or false"):
        read_preference({"prompt": "Why?", "completion": "So.", "label": value}, judged=True)
