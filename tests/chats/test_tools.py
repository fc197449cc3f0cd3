"""Templates that take tools, each in its own way, and templates that drop tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from chats.template_helpers import NAMES, byte_level, template_tokenizer
from phinetune.chats.encoder import make_encoder
from phinetune.chats.template import render
from phinetune.chats.tools import ToolStyle, tool_style
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.errors import RowError

# In the way of templates that take transformers' `tools=` and read `tool_calls`.
BOTH = (
    "{% if tools %}{{ '<|system|>' ~ (tools | tojson) ~ '<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '{' ~ call.function.name ~ call.function.arguments | tojson ~ '}' }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Help.", "tools": [TOOL]},
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]


def both() -> Any:
    return byte_level(BOTH, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"], left=False)


@pytest.mark.parametrize(
    ("make", "style"),
    [
        pytest.param(both, ToolStyle("argument", "template"), id="a template that takes both"),
        pytest.param(lambda: template_tokenizer("phi-4-mini"), ToolStyle("message", "content"), id="phi-4-mini"),
        pytest.param(lambda: byte_tokenizer(300), ToolStyle(None, None), id="random model"),
        *(
            pytest.param(lambda name=name: template_tokenizer(name), ToolStyle(None, None), id=name)
            for name in NAMES[:-1]
        ),
    ],
)
def test_the_style_of_each_template_is_found(make: Callable[[], Any], style: ToolStyle) -> None:
    assert tool_style(make()) == style


def test_phi_4_mini_gets_tools_in_the_system_message_and_calls_between_its_tokens() -> None:
    tokenizer = template_tokenizer("phi-4-mini")
    function = json.dumps([TOOL["function"]], ensure_ascii=False)
    assert render(tokenizer, CHAT) == (
        f"<|system|>Help.<|tool|>{function}<|/tool|><|end|><|user|>Rain?<|end|>"
        '<|assistant|><|tool_call|>[{"name": "weather", "arguments": {"city": "Köln"}}]<|/tool_call|><|end|>'
        '<|tool|>{"rain": true}<|end|><|assistant|>Yes.<|end|><|endoftext|>'
    )
    row = make_encoder(tokenizer).encode([CHAT])[0]
    wanted = {"<|tool|>": 2, "<|/tool|>": 1, "<|tool_call|>": 1, "<|/tool_call|>": 1}
    assert {token: row.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in wanted} == wanted
    trained = tokenizer.decode([i for i in row.labels if i != -100])
    assert trained == (
        '<|tool_call|>[{"name": "weather", "arguments": {"city": "Köln"}}]<|/tool_call|><|end|>Yes.<|end|><|endoftext|>'
    )


def test_a_call_can_hold_typed_control_tokens_and_they_stay_letters() -> None:
    tokenizer = template_tokenizer("phi-4-mini")
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "<|/tool_call|><|end|>"}}}
    chat = [{**CHAT[0]}, CHAT[1], {**CHAT[2], "tool_calls": [call]}, {**CHAT[3], "content": "<|user|>"}, CHAT[4]]
    chat[0]["tools"] = [{"type": "function", "function": {"name": "say", "description": "<|/tool|>"}}]
    row = make_encoder(tokenizer).encode([chat])[0]
    wanted = {"<|tool_call|>": 1, "<|/tool_call|>": 1, "<|end|>": 5, "<|user|>": 1, "<|/tool|>": 1}
    assert {token: row.input_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in wanted} == wanted


def test_a_template_that_takes_tools_gets_them_as_an_argument() -> None:
    tokenizer = both()
    text = render(tokenizer, CHAT)
    assert text.startswith(f"<|system|>{json.dumps([TOOL], ensure_ascii=False)}<|end|><|system|>Help.<|end|>")
    assert '{weather{"city": "Köln"}}<|end|>' in text
    # A system message that only carries the tools is not rendered.
    assert "<|system|><|end|>" not in render(tokenizer, [{**CHAT[0], "content": ""}, *CHAT[1:]])


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize(
    ("chat", "dropped"),
    [
        pytest.param(CHAT, "tools", id="tools"),
        pytest.param(CHAT[1:3], "tool calls", id="tool calls"),
        pytest.param([CHAT[1], CHAT[3], CHAT[4]], "tool messages", id="tool messages"),
    ],
)
def test_a_template_that_drops_them_is_refused_by_what_it_drops(
    name: str, chat: list[dict[str, Any]], dropped: str
) -> None:
    with pytest.raises(RowError, match=f"drops {dropped} in silence"):
        make_encoder(template_tokenizer(name)).prepare(chat)


@pytest.mark.parametrize(("system", "first"), [("drop", "Rain?"), ("fold", "Help.\n\nRain?")], ids=["drop", "fold"])
def test_tools_survive_a_dropped_or_folded_system_message(system: Any, first: str) -> None:
    chat = make_encoder(template_tokenizer("phi-4-mini"), system=system).prepare(CHAT)
    assert (chat[0]["content"], chat[0]["tools"], chat[1]["content"]) == ("", [TOOL], first)


def test_tools_survive_a_cut() -> None:
    encoder = make_encoder(template_tokenizer("phi-4-mini"))
    chat = [CHAT[0], {"role": "user", "content": "old " * 50}, {"role": "assistant", "content": "ok"}, *CHAT[1:]]
    fitted = encoder.fit(chat, len(encoder.encode([CHAT])[0].input_ids))
    assert fitted is not None
    assert fitted[0] == CHAT
