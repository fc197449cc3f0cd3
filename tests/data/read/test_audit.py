"""Whatever text a row has, it is read or it is named: in all forms, in turns, parts, tools and calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phinetune.config.row_forms import CHAT_KEYS, READY, ROW_FORMS
from phinetune.data.read.audit import FLOATS, NULLS, audit_row

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "alpaca": {"instruction": "Hi", "input": "!", "output": "Ho", "history": [["a", "b"]]},
    "prompt_completion": {"prompt": "Hi", "completion": "Ho"},
    "tokens": {"input_ids": [1], "labels": [1], "attention_mask": [1], "completion_mask": [1]},
    "text": {"text": "Hi"},
}
# What a row may have besides, and whether it is words; None where nothing is lost.
MORE: list[tuple[str, Any, bool | None]] = [
    ("system_prompt", "Be kind.", True),
    ("context", {"title": ["a"]}, True),
    ("", "0", True),
    ("chosen", [{"role": "assistant", "content": "x"}], True),
    ("id", 7, False),
    ("score", 0.0, False),
    ("parallel_tool_calls", False, False),
    ("position_ids", [0, 1], False),
    ("note", " ", False),
    ("note", "", None),
    ("note", None, None),
    ("note", {"a": None, "b": [None, ""]}, None),
]


@pytest.mark.parametrize(("key", "value", "words"), MORE, ids=[f"{key}: {value}" for key, value, _ in MORE])
@pytest.mark.parametrize("form", ROWS)
def test_a_column_that_no_form_reads_is_named(form: str, key: str, value: Any, words: bool | None) -> None:
    found = audit_row({**ROWS[form], key: value}, form).unused
    assert found == ({} if words is None else {key or "(no name)": words})


@pytest.mark.parametrize("form", ROW_FORMS, ids=[form.name for form in ROW_FORMS])
def test_what_a_form_reads_is_not_named_and_what_another_reads_is(form: Any) -> None:
    own = {key: "x" for other in ROW_FORMS for group in other.keys for key in group} | dict.fromkeys(CHAT_KEYS, "x")
    wanted = own.keys() - {key for group in form.keys for key in group} - set(form.more)
    wanted -= set() if form.name in READY else set(CHAT_KEYS)
    assert set(audit_row(own, form.name).unused) == wanted


def test_columns_that_are_taken_are_not_named() -> None:
    assert audit_row({**ROWS["messages"], "kind": "x"}, "messages", taken=["kind"]).unused == {}


def turn(role: str, /, **more: Any) -> dict[str, Any]:
    return {"messages": [{**message, **(more if message["role"] == role else {})} for message in (USER, ANSWER)]}


TURNS: list[tuple[dict[str, Any], dict[str, bool]]] = [
    (turn("assistant", reasoning_content="Hm."), {"turns[].reasoning_content": True}),
    (turn("assistant", thinking="Hm.", reasoning=" "), {"turns[].thinking": True, "turns[].reasoning": False}),
    (turn("user", name="Ann"), {"turns[].name": True}),
    (turn("assistant", refusal=None, audio={"id": "a1", "data": "x"}), {"turns[].audio": True}),
    (turn("assistant", annotations=[], logprobs={"content": [{"token": "x"}]}), {"turns[].logprobs": True}),
    (turn("assistant", value="Hu", text="Ha"), {"turns[].value": True, "turns[].text": True}),
    (turn("assistant", train=True, weight=1), {}),
    (turn("user", loss_mask=1), {"turns[].loss_mask": False}),
    (turn("user", tools="[]"), {"turns[].tools": True}),
    (turn("user", tool_call_id="c1"), {}),
    (turn("user", content=[{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]),
     {"turns[].content[].cache_control": True}),
    (turn("assistant", tool_calls=[{**CALL, "index": 0}]), {"turns[].tool_calls[].index": False}),
    (turn("assistant", tool_calls=json.dumps([{**CALL, "note": "x"}])), {"turns[].tool_calls[].note": True}),
    (turn("assistant", function_call={"name": "f", "arguments": "{}", "why": "x"}), {"turns[].tool_calls[].why": True}),
    (turn("assistant", tool_calls=[{"function": {**CALL["function"], "output": "x"}}]),
     {"turns[].tool_calls[].function.output": True}),
    ({**turn("user"), "tools": [{"function": {"name": "f", "strict": True}, "cache_control": "x"}]},
     {"tools[].cache_control": True}),
    ({**turn("user"), "system": [{"text": "Be kind.", "cachePoint": "x"}]}, {"system[].cachePoint": True}),
    ({"messages": json.dumps(turn("user", name="Ann")["messages"])}, {"turns[].name": True}),
    ({"conversations": [{"from": "human", "value": "Hi", "role": "x"}, {"from": "gpt", "value": "Ho", "id": 3}]},
     {"turns[].role": True, "turns[].id": False}),
    ({"conversation": [{**USER, "from": None, "lang": "de"}, ANSWER]}, {"turns[].lang": True}),
    ({"prompt": [{**USER, "name": "Ann"}], "completion": [{**ANSWER, "thinking": "Hm."}]},
     {"turns[].name": True, "turns[].thinking": True}),
    ({"messages": [{"role": "system", "content": "", "tools": [{"function": {"name": "f"}, "why": "x"}]}, ANSWER]},
     {"tools[].why": True}),
    ({"messages": [{**USER, "note": "x"}, {**ANSWER, "note": 3}]}, {"turns[].note": True}),
    ({"prompt": "[1] Hi", "completion": "[{"}, {}),
    ({"prompt": '[{"a": 1}]', "completion": '{"a": 1}', "system": '[{"a": 1}]'}, {}),
    ({"instruction": '[{"a": 1}]', "input": '{"a": 1}', "output": '{"a": 1}'}, {}),
    (turn("user", content='[{"a": 1}]', train=None), {}),
    ({"prompt": json.dumps({**USER, "note": "x"}), "completion": json.dumps([{**ANSWER, "id": 1}])},
     {"turns[].note": True, "turns[].id": False}),
    (turn("assistant", role="function_call", content=json.dumps({"name": "f", "parameters": {"x": 1}, "thought": "x"})),
     {"turns[].tool_calls[].thought": True}),
    (turn("assistant", role="Function_Call", content=json.dumps([{"name": "f", "args": {"x": 1}, "turn": 1}])),
     {"turns[].tool_calls[].turn": False}),
    ({"conversations": [{"from": "human", "value": "Hi"},
                        {"from": "function_call", "value": '{"name": "f", "input": {}, "why": "x"}'}]},
     {"turns[].tool_calls[].why": True}),
    (turn("assistant", function_call='{"name": "f", "arguments": {}, "why": "x"}'), {"turns[].tool_calls[].why": True}),
    (turn("assistant", tool_calls=[{"function": {"name": "f", "parameters": {"x": 1}, "type": "x"}, "name": "g"}]),
     {"turns[].tool_calls[].name": True, "turns[].tool_calls[].function.type": True}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wanted"), TURNS, ids=[str(number) for number in range(len(TURNS))])
def test_keys_of_turns_tools_and_parts_are_named(row: dict[str, Any], wanted: dict[str, bool]) -> None:
    form = next(form.name for form in ROW_FORMS if form.fits(row))
    assert audit_row(row, form).unused == wanted


def test_what_the_template_writes_is_not_named() -> None:
    row = {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "name": "Bob", "audio": {"id": "x"}}]}
    asked: set[tuple[str, str]] = set()

    def reads(role: str, key: str) -> bool:
        asked.add((role, key))
        return role == "user"

    assert audit_row(row, "messages", reads).unused == {"turns[].name": True, "turns[].audio": True}
    assert asked == {("user", "name"), ("assistant", "name")}


def test_a_name_that_would_disturb_a_terminal_is_shown_safely() -> None:
    assert audit_row({**ROWS["text"], "\x1b[31m" + "k" * 90: "x"}, "text").unused == {"?[31m" + "k" * 32 + "…": True}


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [USER, {**ANSWER, "tool_calls": [call]}], **more}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (calling({"x": 1, "y": [None, 1.5]}), set()),
        (calling({"x": None}), {NULLS}),
        (calling({"x": [{"y": None}]}), {NULLS}),
        (calling({"x": 2.0}), {FLOATS}),
        (calling({}, tools=[{"function": {"name": "f", "parameters": {"default": None, "minimum": 0.0}}}]),
         {NULLS, FLOATS}),
        (calling({}, tools=json.dumps([{"name": "f", "default": None}])), {NULLS}),
        (calling(json.dumps({"x": None, "y": 2.0})), set()),
        ({"messages": [USER, {**ANSWER, "tool_calls": json.dumps([{"name": "f", "arguments": {"x": 2.0}}])}]}, set()),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "f", "arguments": {"x": 2.0}}}]}, {FLOATS}),
        ({"messages": [USER, {**ANSWER, "function_call": {"name": "f", "parameters": {"x": 2.0}}}]}, {FLOATS}),
    ],
)  # fmt: skip
def test_what_storage_may_have_changed_is_told(row: dict[str, Any], wanted: set[str]) -> None:
    assert audit_row(row, "messages").notes == wanted


def test_what_is_not_read_is_named_in_the_order_of_the_row() -> None:
    more = dict.fromkeys(["f", "c", "a", "h", "e", "b", "g", "d"], "x")
    call = {**CALL, "function": {**CALL["function"], **more}, **more}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", **more}]},
        {**ANSWER, "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "f"}, **more}]
    found = list(audit_row({"messages": turns, "tools": tools}, "messages").unused)
    for place in ("turns[].content[]", "tools[]", "turns[].tool_calls[]", "turns[].tool_calls[].function"):
        assert [name for name in found if name.rpartition(".")[0] == place] == [f"{place}.{key}" for key in more]
