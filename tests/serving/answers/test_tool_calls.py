"""Tools: a call that the model writes comes back as `tool_calls`, whole and streamed, and so goes the turn after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from chats.template_helpers import template_tokenizer
from helpers import TINY
from phinetune.chats.template import style_of
from phinetune.config.model import ModelSection
from phinetune.serving.answers.tool_calls import CallForm, call_form, read_tool_calls
from serving.answers.served import Served, serving

ASKED: list[Any] = [{"role": "user", "content": "weather?"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}},
    {"type": "function", "function": {"name": "time", "description": "now", "parameters": {"type": "object"}}},
]
MARKED = (  # a template that writes calls between marks of its own
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<call>"
    "{{ c.function | tojson }}</call>{% endfor %}<|end|>{% endfor %}{{ tools | tojson if tools else '' }}"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server")
    template_tokenizer("phi-4-mini").save_pretrained(folder / "tokenizer")
    tiny = ModelSection(path=TINY, dtype="float32", device="cpu", tokenizer=str(folder / "tokenizer"))
    with serving(folder, tiny) as one:
        yield one


def ask(served: Served, **options: Any) -> Any:
    call: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "seed": 1, **options}
    return served.client.chat.completions.create(**call)


def test_a_call_that_has_to_come_comes(served: Served) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    choice = ask(served, tool_choice=named).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    parts = [chunk.choices[0] for chunk in ask(served, tool_choice=named, stream=True)]
    streamed = [call for part in parts for call in part.delta.tool_calls or []]
    assert [one.function.model_dump() for one in streamed] == [call.function.model_dump()]
    assert streamed[0].index == 0
    assert parts[-1].finish_reason == "tool_calls"
    assert not any(part.delta.content for part in parts)
    turn = {"role": "assistant", "tool_calls": [call.model_dump()]}
    back = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = ask(served, messages=[*ASKED, turn, back], max_tokens=3)
    assert after.usage.prompt_tokens > ask(served, max_tokens=3).usage.prompt_tokens


def test_without_a_call_the_answer_is_text(served: Served) -> None:
    """Bias makes the model write one letter again and again."""
    letter = str(template_tokenizer("phi-4-mini").convert_tokens_to_ids("M"))
    for options in ({}, {"tool_choice": "none"}):
        choice = ask(served, max_tokens=5, logit_bias={letter: 100}, **options).choices[0]
        assert choice.message.content == "M" * 5
        assert choice.message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="names no tool"):
        ask(served, tool_choice={"type": "function", "function": {"name": "nobody"}})


BARE = MARKED.replace("<call>", "").replace("</call>", "")  # calls are objects without marks


def test_one_call_alone_where_several_are_not_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A form makes the model write two calls."""
    tokenizer = template_tokenizer("phi-4-mini")
    tokenizer.chat_template = BARE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    two = [{"const": {"name": name, "arguments": {}}} for name in ("weather", "time")]
    schema = {"type": "array", "prefixItems": two, "items": False, "minItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "calls", "schema": schema}}
    array = {str(tokenizer.convert_tokens_to_ids("[")): 100}  # the other way to begin is a single call
    tiny = ModelSection(path=TINY, dtype="float32", device="cpu", tokenizer=str(tmp_path / "tokenizer"))
    with serving(tmp_path, tiny, adapter=False) as one, caplog.at_level(logging.INFO):
        for wanted, names in ((None, ["weather", "time"]), (True, ["weather", "time"]), (False, ["weather"])):
            options = {"response_format": form, "parallel_tool_calls": wanted, "logit_bias": array}
            choice = ask(one, **options).choices[0]
            assert [call.function.name for call in choice.message.tool_calls] == names
            parts = [chunk.choices[0].delta.tool_calls or [] for chunk in ask(one, stream=True, **options)]
            assert [call.function.name for calls in parts for call in calls] == names
    assert caplog.text.count("1 calls after the first are left out") == 2


def test_an_answer_in_a_form_may_be_a_call_instead(served: Served) -> None:
    """Bias makes the model begin one or the other."""
    schema = {"type": "object", "properties": {"sky": {"const": "clear"}}, "required": ["sky"]}
    form = {"type": "json_schema", "json_schema": {"name": "sky", "schema": {**schema, "additionalProperties": False}}}
    begins = template_tokenizer("phi-4-mini").convert_tokens_to_ids(["<|tool_call|>", "{"])
    call, answer = (
        ask(served, response_format=form, logit_bias={str(id): 50}, max_tokens=200).choices[0] for id in begins
    )
    assert call.finish_reason == "tool_calls"
    assert call.message.tool_calls[0].function.name in ("weather", "time")
    assert json.loads(answer.message.content) == {"sky": "clear"}
    assert answer.message.tool_calls is None
    bad = {"type": "json_schema", "json_schema": {"name": "sky", "schema": {"type": "sky"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid schema for 'response_format'"):
        ask(served, response_format=bad)


def test_a_strict_function_that_is_not_kept_to_is_named(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    strict = [TOOLS[0], {"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}]
    for choice, told in ((None, True), ("auto", True), ("required", False), ("none", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            ask(served, tools=strict, tool_choice=choice, max_tokens=1)
        assert ("tools[1].function.strict: not applied" in caplog.text) == told
        assert "tools[0]" not in caplog.text


def test_forms_of_templates() -> None:
    tokenizer = template_tokenizer("phi-4-mini")
    form = call_form(tokenizer, style_of(tokenizer))
    assert (form.begin, form.end, form.listed, len(form.ids)) == ("<|tool_call|>", "<|/tool_call|>", True, 2)
    tokenizer = template_tokenizer("phi-3")
    tokenizer.chat_template = MARKED
    assert call_form(tokenizer, style_of(tokenizer)) == CallForm("<call>", "</call>", frozenset(), False)


def test_reading_calls() -> None:
    names = ["weather", "time"]
    text = '<call>{"name": "weather", "arguments": {"city": "Köln"}}</call>\n<call>{"name": "time"}</call>'
    first, second = read_tool_calls(text, names)
    assert first["function"] == {"name": "weather", "arguments": '{"city": "Köln"}'}
    assert second["function"] == {"name": "time", "arguments": "{}"}
    assert first["id"] != second["id"]
    listed = read_tool_calls('<|tool_call|>[{"name": "time", "parameters": {"zone": 1}}]<|/tool_call|>', names)
    assert listed[0]["function"]["arguments"] == '{"zone": 1}'
    for none in ('{"name": "nobody"}', "<call>{broken", "[[[[", '{"answer": 5}'):
        assert read_tool_calls(none, names) == []
