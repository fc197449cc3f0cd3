"""How a checkpoint's chat template takes tools and tool calls, found out by rendering with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"

_NAME, _VALUE = "zqxname", "zqxvalue"  # no template writes these by itself
_USER = {"role": "user", "content": "hello"}
_TOOL = {"type": "function", "function": {"name": _NAME, "description": _VALUE, "parameters": {}}}
_CALL = {"type": "function", "function": {"name": _NAME, "arguments": {"key": _VALUE}}}


@dataclass(frozen=True)
class ToolStyle:
    """Where a template looks for tools and for the calls of an assistant's turn; None where it drops them in silence.

    Attributes:
        tools: `argument` is transformers' `tools=`; `message` a JSON text `tools` on the system message (Phi-4 mini).
        calls: `template` reads `tool_calls`; `content` means that the checkpoint has the tokens `<|tool_call|>` and
            `<|/tool_call|>`, and its calls are written between them in the turn's content (Phi-4 mini).
    """

    tools: Literal["argument", "message"] | None = None
    calls: Literal["template", "content"] | None = None


def tool_style(tokenizer: PreTrainedTokenizerBase) -> ToolStyle:
    """Probe a tokenizer's template."""
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
    try:
        text = str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    except Exception:  # a template refuses by raising whatever Jinja or its author chose
        return False
    return _NAME in text and _VALUE in text


def lay_out(messages: Sequence[dict[str, Any]], style: ToolStyle) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages and the `tools=` argument as the template takes them.

    Args:
        messages: `tools` on the first (a system) message, `tool_calls` on assistants' messages.
    """
    chat = [_with_calls(message, style) for message in messages]
    tools = chat[0].pop("tools", None) if chat else None
    if not tools:
        return chat, None
    if style.tools == "message":
        functions = [tool.get("function", tool) for tool in tools]
        chat[0]["tools"] = json.dumps(functions, ensure_ascii=False)
        return chat, None
    # A system message without words stands there to carry the tools, and the template has its own place for them.
    return (chat if chat[0]["content"] else chat[1:]), tools


def _with_calls(message: dict[str, Any], style: ToolStyle) -> dict[str, Any]:
    made = dict(message)
    if style.calls == "content" and "tool_calls" in made:
        calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in made.pop("tool_calls")]
        made["content"] += f"{CALL}{json.dumps(calls, ensure_ascii=False)}{CALL_END}"
    return made
