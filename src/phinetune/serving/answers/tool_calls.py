"""How a model writes tool calls, and how they come back as the API's `tool_calls`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from phinetune.chats.template_rendering import apply_template
from phinetune.chats.tools import CALL, CALL_END, ToolStyle

_USER = {"role": "user", "content": "hello"}
_TEXT = "zqxtext"
_CALL = {"type": "function", "function": {"name": "zqxname", "arguments": {"key": "zqxvalue"}}}
ARGUMENTS = ("arguments", "parameters")  # a model's names for them


@dataclass(frozen=True)
class CallForm:
    """What stands around a call in a model's answer.

    Attributes:
        begin, end: the marks; empty if there are none.
        ids: those of the marks that are special tokens.
        listed: whether calls stand in a list between them.
    """

    begin: str
    end: str
    ids: frozenset[int]
    listed: bool


def call_form(tokenizer: PreTrainedTokenizerBase, style: ToolStyle) -> CallForm:
    """The form in which a tokenizer's template writes calls."""
    begin, end = (CALL, CALL_END) if style.calls == "content" else _rendered_marks(tokenizer)
    tokens = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    ids = frozenset(tokens[mark] for mark in (begin, end) if mark in tokens)
    return CallForm(begin, end, ids, style.calls == "content")


def _rendered_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the template writes before and after a call's object, in a turn that has one call."""
    turn = {"role": "assistant", "content": _TEXT}
    try:
        texts = apply_template(tokenizer, [[_USER, turn], [_USER, {**turn, "tool_calls": [_CALL]}]])
    except Exception:  # Jinja and a template's author can raise errors of any class
        return "", ""
    (_, said, tail), (_, said_too, call) = (text.rpartition(_TEXT) for text in texts)
    if not said or not said_too or "zqxname" not in call or not call.endswith(tail):
        return "", ""
    start, stop = call.find("{"), call.rfind("}") + 1
    return call[:start].strip(), call[stop : len(call) - len(tail)].strip()


def read_tool_calls(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The calls in the part of an answer that holds them, in the API's form; empty if it holds none.

    Args:
        names: of the tools that may be called.
    """
    calls = []
    for found in _objects(text):
        inner = found.get("function")
        function: dict[str, Any] = inner if isinstance(inner, dict) else found
        name = function.get("name")
        given: Any = next((function[key] for key in ARGUMENTS if key in function), {})
        if name not in names:
            return []
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
        calls.append({**call, "function": {"name": name, "arguments": arguments}})
    return calls


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, those of lists too, from the first to the last."""
    decoder, place = json.JSONDecoder(), 0
    while places := [i for i in (text.find("{", place), text.find("[", place)) if i >= 0]:
        place = min(places)
        try:
            found, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        yield from (one for one in (found if isinstance(found, list) else [found]) if isinstance(one, dict))
