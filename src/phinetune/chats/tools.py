"""Finds out how a checkpoint's chat template takes tools and tool calls, by rendering test chats with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from phinetune.chats.template_rendering import apply_template

CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"

_NAME, _VALUE = "zqxname", "zqxvalue"  # words that no template writes itself
_USER = {"role": "user", "content": "hello"}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": _VALUE, "parameters": {}}}
_CALL = {"type": "function", "function": {"name": _NAME, "arguments": {"key": _VALUE}}}


@dataclass(frozen=True)
class ToolStyle:
    """Where a template expects tools, and the tool calls of an assistant's turn.

    Attributes:
        tools: `argument`: in transformers' argument `tools=`. `message`: as JSON text in the key `tools` of the system
            message (Phi-4 mini). None: the template drops tools without a warning.
        calls: `template`: in the turn's key `tool_calls`. `content`: in the turn's content, between the tokens
            `<|tool_call|>` and `<|/tool_call|>`, which the checkpoint has (Phi-4 mini). None: the template drops calls
            without a warning.
    """

    tools: Literal["argument", "message"] | None = None
    calls: Literal["template", "content"] | None = None


def tool_style(tokenizer: PreTrainedTokenizerBase) -> ToolStyle:
    """Find out the style of a tokenizer's template."""
    system = {"role": "system", "content": "hello"}
    tools: Literal["argument", "message"] | None = None
    if _shows(tokenizer, [_USER], [_TOOL]) or _shows(tokenizer, [system, _USER], [_TOOL]):
        tools = "argument"
    elif _shows(tokenizer, [{**system, "tools": json.dumps([_TOOL])}, _USER]):
        tools = "message"
    calls: Literal["template", "content"] | None = None
    if _shows(tokenizer, [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]):
        calls = "template"
    elif {CALL, CALL_END} <= {token.content for token in tokenizer.added_tokens_decoder.values()}:
        calls = "content"
    return ToolStyle(tools, calls)


def _shows(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> bool:
    """Whether the rendered chat contains the test words."""
    try:
        text = apply_template(tokenizer, [messages], tools=tools)[0]
    except Exception:  # Jinja and a template's author can raise errors of any class
        return False
    return _NAME in text and _VALUE in text


def lay_out(messages: Sequence[dict[str, Any]], style: ToolStyle) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages, and the argument `tools=`, in the form that the template takes.

    Args:
        messages: a chat. Tools are in the key `tools` of a system message that comes first, tool calls in the key
            `tool_calls` of the assistant's messages.

    Returns:
        messages and tools; None if there are no tools, or if they are in the messages.
    """
    chat = [_with_calls(message, style) for message in messages]
    tools = chat[0].pop("tools", None) if chat else None
    if not tools:
        return chat, None
    if style.tools == "message":
        functions = [tool.get("function", tool) for tool in tools]
        chat[0]["tools"] = json.dumps(functions, ensure_ascii=False)
        return chat, None
    # A system message without text is left out: it only carried the tools, which the template puts elsewhere.
    return (chat if chat[0]["content"] else chat[1:]), tools


def _with_calls(message: dict[str, Any], style: ToolStyle) -> dict[str, Any]:
    made = dict(message)
    if style.calls == "content" and "tool_calls" in made:
        calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in made.pop("tool_calls")]
        made["content"] += f"{CALL}{json.dumps(calls, ensure_ascii=False)}{CALL_END}"
    return made
