"""Tools and calls of both worlds become one form."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from phinetune.data.read.messages import RowError, to_messages

FUNCTION = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
USER = {"role": "user", "content": "Rain?"}
RESULT = {"role": "tool", "content": '{"rain": true}'}
YES = {"role": "assistant", "content": "Yes."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
WANTED = [{"role": "system", "content": "", "tools": [TOOL]}, USER, CALLING, RESULT, YES]

ARGUMENTS = CALL["function"]["arguments"]  # type: ignore[index]
AS_TEXT = {"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
SHARE = [
    {"from": "human", "value": "Rain?"},
    {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": ARGUMENTS})},
    {"from": "observation", "value": '{"rain": true}'},
    {"from": "gpt", "value": "Yes."},
]
OPENAI = [USER, {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]}, RESULT, YES]
OLD = [USER, {"role": "assistant", "function_call": AS_TEXT["function"]}, {**RESULT, "role": "function"}, YES]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": OPENAI, "tools": [TOOL]},
        {"messages": OPENAI, "tools": json.dumps([TOOL])},
        {"messages": json.dumps(OPENAI), "tools": json.dumps([FUNCTION])},
        {"messages": OLD, "functions": [FUNCTION]},
        {"conversations": SHARE, "tools": json.dumps([FUNCTION])},
        {"conversations": SHARE, "tools": [TOOL]},
        {"prompt": [USER], "completion": OPENAI[1:], "tools": [TOOL]},
    ],
    ids=["openai", "openai, tools as text", "all as text", "openai's older form", "sharegpt", "objects", "prompt"],
)
def test_each_form_gives_the_same_chat(fields: dict[str, Any]) -> None:
    assert to_messages(fields) == WANTED


def test_tools_ride_on_the_system_message_that_is_there() -> None:
    chat = to_messages({"messages": [{"role": "system", "content": "Help."}, *OPENAI], "tools": [TOOL]})
    assert chat[0] == {"role": "system", "content": "Help.", "tools": [TOOL]}
    assert chat[1:] == WANTED[1:]


def test_several_calls_ids_and_words_are_kept() -> None:
    value = json.dumps([{"name": "a", "arguments": {}}, {"name": "b"}])
    chat = to_messages({"conversations": [SHARE[0], {"from": "function_call", "value": value}]})
    assert [call["function"] for call in chat[1]["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {}},
    ]
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [{**AS_TEXT, "id": "c1"}]}
    answer = {**RESULT, "tool_call_id": "c1", "name": "weather"}
    chat = to_messages({"messages": [USER, turn, answer, YES]})
    assert chat[1] == {"role": "assistant", "content": "Let me look.", "tool_calls": [{**CALL, "id": "c1"}]}
    assert chat[2] == answer


def test_tools_in_the_system_turn_are_tools() -> None:
    """Phi-4 mini's own form."""
    system = {"role": "system", "content": "Help.", "tools": json.dumps([FUNCTION])}
    chat = to_messages({"messages": [system, *OPENAI]})
    assert chat[0] == {"role": "system", "content": "Help.", "tools": [TOOL]}
    assert to_messages({"messages": [system, *OPENAI], "tools": [TOOL]}) == chat


@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "parameters": ARGUMENTS, "thought": "Why?"},
        {"name": "weather", "args": ARGUMENTS, "type": "tool_call"},
        {"name": "weather", "input": ARGUMENTS, "arguments": None},
        {"name": "weather", "input": json.dumps(ARGUMENTS), "arguments": ""},
        {"name": "weather", "arguments": ARGUMENTS, "parameters": json.dumps(ARGUMENTS)},
        {"type": "function", "function": {"name": "weather", "parameters": ARGUMENTS}},
        {"function": {"name": "weather"}, "arguments": ARGUMENTS},
    ],
    ids=["Llama 3's", "LangChain's", "Anthropic's", "as text", "said twice", "in its function", "beside its function"],
)
def test_arguments_are_found_under_their_other_names(call: dict[str, Any]) -> None:
    as_turn = {"conversations": [SHARE[0], {"from": "function_call", "value": json.dumps(call)}]}
    as_calls = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    for row in (as_turn, as_calls):
        assert to_messages(row)[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize("more", [{"index": 0}, {"id": "c1"}, {"note": ""}, {"parameters": {}}])
def test_a_call_may_have_no_arguments(more: dict[str, Any]) -> None:
    chat = to_messages({"messages": [USER, {**YES, "tool_calls": [{"name": "f", **more}]}]})
    assert chat[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


PADDED = {"city": "Rome", "zone": None, "where": {"lat": 1.5, "near": None}, "all": [{"x": None}, None, 2.0]}


@pytest.mark.parametrize(
    ("turn", "wanted"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": PADDED}}]}, False),
        ({"function_call": {"name": "f", "arguments": PADDED}}, False),
        ({"tool_calls": [{"function": {"name": "f", "arguments": json.dumps(PADDED)}}]}, True),
        ({"tool_calls": json.dumps([{"function": {"name": "f", "arguments": PADDED}}])}, True),
        ({"role": "function_call", "content": json.dumps({"name": "f", "arguments": PADDED})}, True),
    ],
    ids=["objects", "older form", "arguments as text", "calls as text", "a turn as text"],
)
def test_nulls_stay_in_json_text_alone(turn: dict[str, Any], wanted: bool) -> None:
    chat = to_messages({"messages": [USER, {"role": "assistant", **turn}]})
    without = {"city": "Rome", "where": {"lat": 1.5}, "all": [{}, None, 2.0]}
    assert chat[1]["tool_calls"][0]["function"]["arguments"] == (PADDED if wanted else without)


@pytest.mark.parametrize("as_text", [True, False])
def test_nulls_are_left_out_of_tools(as_text: bool) -> None:
    tools = [
        {"function": {**FUNCTION, "strict": None, "parameters": {"type": "object", "default": None}}, "type": None}
    ]
    row = {"messages": [USER, YES], "tools": json.dumps(tools) if as_text else tools}
    assert to_messages(row)[0]["tools"] == [TOOL]


def test_a_tool_without_its_wrapping_is_one_where_a_table_has_the_key() -> None:
    row = {"messages": [USER, YES], "tools": [{**FUNCTION, "type": None, "function": None}]}
    assert to_messages(row)[0]["tools"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("tools", [[], "", "[]", None], ids=["empty list", "empty text", "empty list as text", "null"])
def test_empty_tools_are_none(tools: Any) -> None:
    row: dict[str, Any] = {"messages": [USER, {**YES, "tool_calls": None}], "tools": tools}
    assert to_messages(row) == [USER, YES]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [USER, YES], "tools": "{"}, "`tools`: broken JSON"),
        ({"messages": [USER, YES], "tools": {"name": "x"}}, "`tools` must be a list"),
        ({"messages": [USER, YES], "tools": [{"description": "x"}]}, "`tools`, tool 1: expected an object with `name`"),
        ({"messages": [USER, YES], "tools": [None]}, "tool 1: expected an object"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, YES]}, "only an assistant's turn can call tools, not a user"),
        ({"messages": [USER, {**YES, "tool_calls": "x"}]}, "turn 2: `tool_calls`: broken JSON"),
        ({"messages": [USER, {**YES, "tool_calls": {"a": 1}}]}, "turn 2: `tool_calls` must be a list"),
        ({"messages": [USER, {**YES, "tool_calls": [{"function": {}}]}]}, "a tool call needs a `name`"),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "the arguments of `f`: broken JSON",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
            "the arguments of `f` must be an object",
        ),
        ({"conversations": [SHARE[0], {"from": "function_call", "value": "weather(Oslo)"}]}, "broken JSON"),
        ({"messages": [USER, YES], "tools": [TOOL], "functions": [TOOL]}, "both `tools` and `functions`"),
        (
            {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, USER, YES], "tools": [TOOL, TOOL]},
            "have different `tools`",
        ),
        ({"messages": [{"role": "system", "content": "", "tools": "x"}, USER, YES]}, "turn 1: `tools`: broken JSON"),
        ({"messages": [USER, {**CALLING, "function_call": CALL["function"]}]}, "calls in two places"),
        (
            {"messages": [USER, {"role": "function_call", "content": "{}", "tool_calls": [CALL]}]},
            "calls in two places",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"name": "f", "arguments": {"on": date(2024, 1, 1)}}]}]},
            "the arguments of `f`: a date can't stand in JSON",
        ),
        ({"messages": [USER, YES], "tools": [{**FUNCTION, "x": Decimal(1)}]}, "tool 1: a Decimal can't stand in JSON"),
        ({"messages": [USER, YES], "tools": [{**FUNCTION, "x": [b"y"]}]}, "tool 1: a bytes can't stand in JSON"),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"name": "f", "arguments": {}, "parameters": {"x": 1}}]}]},
            "the arguments of `f` stand in two places and differ (`arguments`, `parameters`)",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"name": "f", "args": {}}, "input": {"x": 1}}]}]},
            "the arguments of `f` stand in two places and differ (`args`, `input`)",
        ),
        (
            {"conversations": [SHARE[0], {"from": "function_call", "value": '{"name": "f", "kwargs": {"x": 1}}'}]},
            "the arguments of `f` are missing, and `kwargs` is not read",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"name": "f"}, "payload": 1}]}]},
            "the arguments of `f` are missing, and `payload` is not read",
        ),
        ({"conversations": [SHARE[0], {"from": "function_call", "value": None}]}, "a tool call needs a `name`"),
    ],
)
def test_a_bad_tool_or_call_says_what_is_wrong(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages(fields)
    assert words in str(caught.value)
    assert caught.value.kind == "tools"
