"""The forms become the same messages; what is wrong with a row is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phinetune.data.read.messages import RowError, detect_form, to_messages

WANTED = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in WANTED]
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}
TURNS = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello")]

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": WANTED}),
    ("messages", {"messages": json.dumps(WANTED)}),
    (
        "messages",
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in WANTED]},
    ),
    ("conversations", {"conversations": [{"from": role, "value": text} for role, text in TURNS]}),
    ("conversations", {"conversations": [{"from": r, "value": t} for r, t in TURNS[1:]], "system": "Be kind."}),
    ("conversations", {"conversations": WANTED}),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind."}),
    ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "system": "Be kind."}),
    ("prompt_completion", {"prompt": WANTED[:2], "completion": WANTED[2:]}),
    ("messages", {"system": "Be kind.", "messages": WANTED[1:]}),
    ("messages", {"system": "Be kind.", "messages": WANTED}),
    ("messages", {"system": [{"text": "Be "}, {"text": "kind."}], "messages": WANTED[1:], "text": "x"}),
    ("messages", {"messages": [{**m, "content": [{"text": m["content"]}]} for m in WANTED]}),
    ("messages", {"messages": [{**m, "content": [{"type": "input_text", "text": m["content"]}]} for m in WANTED]}),
    (
        "prompt_completion",
        {"messages": "", "conversations": None, "prompt": WANTED[:2], "completion": WANTED[2:], "text": ""},
    ),
    ("conversations", {"conversations": None, "conversation": [{**m, "from": None, "value": None} for m in WANTED]}),
]


@pytest.mark.parametrize(
    ("form", "fields"),
    FORMS,
    ids=[
        *("messages", "messages as text", "messages of text parts"),
        *("sharegpt", "sharegpt with a system key", "conversations of messages"),
        *("alpaca", "prompt and completion", "prompt and completion of messages"),
        *("anthropic", "system said twice", "bedrock", "bedrock's parts", "openai's newer parts"),
        *("a table's empty columns", "a table's empty keys of turns"),
    ],
)
def test_each_form_is_detected_and_read(form: str, fields: dict[str, Any]) -> None:
    assert detect_form(fields) == form
    assert to_messages(fields) == WANTED
    assert to_messages(fields, form) == WANTED


def test_alpaca_joins_instruction_and_input_by_a_line_break() -> None:
    messages = to_messages({"instruction": "Add", "input": "1 and 2", "output": "3"})
    assert messages[0]["content"] == "Add\n1 and 2"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (json.dumps(WANTED[:2], indent=2), json.dumps(WANTED[2:], indent=2)),
        ("[ " + json.dumps(WANTED[:2])[1:], json.dumps(WANTED[2])),
        (json.dumps(WANTED[:2]), "\n" + json.dumps({"content": "Hello", "role": "assistant"})),
        (json.dumps([{"content": m["content"], "role": m["role"], "id": 1} for m in WANTED[:2]]), "Hello"),
    ],
    ids=["indented", "a blank", "one turn", "keys the other way"],
)
def test_turns_in_the_cells_of_a_table_are_read(prompt: str, completion: str) -> None:
    assert to_messages({"prompt": prompt, "completion": completion}) == WANTED


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "role": "chemist"}',
        '{"model": "x", "messages": [{"role": "user", "content": "Hi"}]}',
        "{'model': 'x', 'messages': [{'role': 'user', 'content': 'Hi'}]}",
        '[1] is the "role": a part',
        "[]",
        '["role", {"role": 1}]',
        'Say [{"role": "user", "content": "x"}]',
    ],
)
def test_other_json_and_code_stay_text(text: str) -> None:
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert to_messages({"prompt": text, "completion": text}) == chat


@pytest.mark.parametrize(
    "text",
    [
        str(WANTED[:2]),
        str(WANTED[1]),
        "\n".join(map(str, WANTED[:2])).join("[]"),
        "[ {'content': 'Hi', 'role': 'user'}]",
        '[{"role": "user", "content": "Hi"}',
        '{"role": "user", "content": "Hi", "content": "Ho"}',
    ],
    ids=["Python's", "one turn", "numpy's", "keys the other way", "cut short", "a key twice"],
)
def test_turns_in_broken_json_are_refused(text: str) -> None:
    for row in ({"prompt": text, "completion": "Hello"}, {"prompt": "Hi", "completion": text}):
        with pytest.raises(RowError, match="holds broken JSON"):
            to_messages(row)


@pytest.mark.parametrize("value", [0, 0.0, False, 1.0, {}])
@pytest.mark.parametrize("key", ["input", "system", "history"])
def test_a_number_is_no_text_and_no_empty_one(key: str, value: Any) -> None:
    with pytest.raises(RowError, match=f"`{key}` must be"):
        to_messages({"instruction": "Add", "output": "3", key: value})


@pytest.mark.parametrize("value", [None, "", []])
@pytest.mark.parametrize("key", ["input", "system", "history"])
def test_an_empty_value_adds_nothing(key: str, value: Any) -> None:
    messages = to_messages({"instruction": "Add", "output": "3", key: value})
    assert [message["content"] for message in messages] == ["Add", "3"]


def test_alpaca_has_earlier_turns_in_its_history() -> None:
    row = {"instruction": "And 3?", "input": "", "output": "4", "history": [["2?", "3"]], "system": "Count."}
    texts = ["Count.", "2?", "3", "And 3?", "4"]
    assert [m["content"] for m in to_messages(row)] == texts
    assert [m["content"] for m in to_messages({**row, "history": json.dumps(row["history"])})] == texts


def test_further_texts_of_a_turn_are_kept_for_the_template() -> None:
    turn = {"role": "assistant", "content": "Ho", "reasoning_content": "Hm.", "name": " ", "audio": {"id": "x"}, "n": 3}
    assert to_messages({"messages": [WANTED[1], turn]})[1] == {**WANTED[2], "content": "Ho", "reasoning_content": "Hm."}
    share = {"from": "gpt", "value": "Ho", "role": "x", "content": "y", "thinking": "Hm."}
    both = {**WANTED[2], "reasoning": "Hm.", "thinking": "Hm."}
    assert to_messages({"messages": [WANTED[1], both]})[1] == both
    made = to_messages({"conversations": [{"from": "human", "value": "Hi"}, share]})[1]
    assert made == {**WANTED[2], "content": "Ho", "thinking": "Hm."}


def test_half_a_character_in_a_further_text_is_named() -> None:
    with pytest.raises(RowError, match="half a character"):
        to_messages({"messages": [WANTED[1], {**WANTED[2], "thinking": "a\ud83d"}]})


@pytest.mark.parametrize("name", ["tool", "observation"])
def test_tool_turns_of_both_kinds_are_tool_messages(name: str) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": name, "value": "22"}, {"from": "gpt", "value": "22 °C"}]
    assert to_messages({"conversations": turns})[1] == {"role": "tool", "content": "22"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"txt": "x"}, "the keys (txt) are those of no known form"),
        ({"\x1b[31m" + "k" * 90: 1}, "the keys (?[31m" + "k" * 32 + "…) are"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": WANTED[:2]}, "no assistant turn"),
        ({"messages": WANTED[2:]}, "first turn is the assistant's"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "turn 1: unknown role `alien`"),
        ({"messages": [{"role": None, "content": {"a": None}}]}, "turn 1: unknown role `None`"),
        ({"messages": [None]}, "turn 1: expected an object"),
        ({"messages": [*WANTED, {"role": "user", "content": "\ud83d"}]}, "half a character"),
        ({"messages": [*WANTED[:2], {**WANTED[2], "train": "no"}]}, "turn 3: `train` must be true or false"),
        ({"messages": [*WANTED[:2], {**WANTED[2], "weight": 0.5}]}, "turn 3: `weight` must be 0 or 1"),
        ({"messages": "[" * 100_000}, "broken JSON: nested too deeply"),
        (
            {"messages": [WANTED[1], {"role": "assistant", "content": None}]},
            "turn 2: `content` must be text, not miss",
        ),
        ({"messages": [WANTED[1], {"role": "assistant", "content": 3}]}, "turn 2: `content` must be text, not int"),
        ({"messages": "[{"}, "broken JSON"),
        ({"conversations": ["x"]}, "turn 1: expected an object"),
        ({"instruction": 1, "output": "x"}, "`instruction`"),
        ({"instruction": "x", "input": None, "output": None}, "`output` is empty"),
        ({"prompt": "x", "completion": None}, "`completion` is empty"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "`chosen` and `rejected` are for objectives that learn from"),
        ({"system": "Be rude.", "messages": WANTED}, "`system` and the system turn say different things"),
        ({"system": "Be rude.", "conversations": WANTED}, "`system` and the system turn say different things"),
        ({"system": 3, "messages": WANTED[1:]}, "`system`: `system` must be text, not int"),
        ({"conversation": WANTED, "conversations": WANTED}, "both `conversations` and `conversation`"),
        (
            {"instruction": "x", "output": "y", "history": [["q"]]},
            "`history`, exchange 1: expected a list of a question",
        ),
        ({"instruction": "x", "output": "y", "history": [["q", None]]}, "`history`, exchange 1"),
        ({"messages": [WANTED[1], {**WANTED[2], "content": None, "refusal": "No."}]}, "`refusal` holds the text"),
        ({"messages": [WANTED[1], {**WANTED[2], "reasoning": "Hm.", "thinking": "Ah."}]}, "say different things"),
        ({"messages": [{"role": "user", "content": [IMAGE]}, WANTED[2]]}, "a part of the kind `image_url`; only text"),
        ({"messages": [{"role": "user", "content": [{"toolUse": {}}]}, WANTED[2]]}, "a part of the kind `toolUse`"),
        ({"messages": [{"role": "user", "content": ["x"]}, WANTED[2]]}, "a part of the kind `str`"),
    ],
)
def test_a_bad_row_says_what_is_wrong(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages(fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("train", False), ("weight", 0)])
def test_a_turn_can_be_left_out_of_the_loss(key: str, value: object) -> None:
    turns = [*WANTED[:2], {**WANTED[2], key: value}]
    assert to_messages({"messages": turns})[2] == {**WANTED[2], "train": False}
    shares = [{"from": m["role"], "value": m["content"], **({key: value} if m is turns[2] else {})} for m in turns]
    assert to_messages({"conversations": shares})[2] == {**WANTED[2], "train": False}


@pytest.mark.parametrize(("key", "value"), [("train", True), ("weight", 1), ("train", None), ("weight", None)])
def test_a_turn_stays_in_the_loss_if_nothing_takes_it_out(key: str, value: object) -> None:
    assert to_messages({"messages": [*WANTED[:2], {**WANTED[2], key: value}]}) == WANTED


@pytest.mark.parametrize(
    ("form", "fields"),
    [("text", {"text": "x"}), ("tokens", {"input_ids": [1], "labels": [1], "text": "x"})],
    ids=["text", "tokens"],
)
def test_rows_that_are_text_or_ids_are_told(form: str, fields: dict[str, Any]) -> None:
    assert detect_form(fields) == form
