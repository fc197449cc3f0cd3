"""The four usual forms of chat data, each turned into the same list of messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from phinetune.errors import DataError
from phinetune.model.template import Message

# What the roles of each tool that writes chat data mean.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RowError(DataError):
    """What is wrong with one row; the caller knows where it stands."""


def detect_form(fields: Mapping[str, Any]) -> str:
    """The form of a row: messages, conversations, alpaca or prompt_completion.

    Raises:
        RowError: no form has these keys.
    """
    if "messages" in fields:
        return "messages"
    if "conversations" in fields or "conversation" in fields:
        return "conversations"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    raise RowError(
        f"the keys ({', '.join(map(str, fields)) or 'none'}) are those of no known form; expected `messages`, "
        "`conversations`, `instruction` and `output`, or `prompt` and `completion`"
    )


def to_messages(fields: Mapping[str, Any], form: str = "auto") -> list[Message]:
    """The row's chat as messages with `role` (system, user, assistant, tool) and `content`.

    Raises:
        RowError: the row is not of that form, or has no assistant turn that something comes before.
    """
    messages = FORMS[detect_form(fields) if form == "auto" else form](fields)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to learn from it")
    if messages[0]["role"] == "assistant":
        raise RowError("the first turn is the assistant's; a chat starts with a user or system turn")
    return messages


def _from_messages(fields: Mapping[str, Any]) -> list[Message]:
    return _turns(fields, "messages", "role", "content")


def _from_conversations(fields: Mapping[str, Any]) -> list[Message]:
    key = "conversations" if "conversations" in fields else "conversation"
    turns = _listed(fields, key)
    names = ("from", "value") if turns and isinstance(turns[0], Mapping) and "from" in turns[0] else ("role", "content")
    return [*_system(fields), *_turns(fields, key, *names)]


def _from_alpaca(fields: Mapping[str, Any]) -> list[Message]:
    question = _text(fields, "instruction")
    extra = fields.get("input")
    if extra:
        question += "\n" + _text(fields, "input")
    return [*_system(fields), _message("user", question), _message("assistant", _text(fields, "output"))]


def _from_prompt_completion(fields: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = _system(fields)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields.get(key), str) and not _looks_like_turns(fields[key]):
            messages.append(_message(role, fields[key]))
        else:
            messages += _turns(fields, key, "role", "content")
    return messages


FORMS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _system(fields: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _text(fields, "system"))] if fields.get("system") else []


def _turns(fields: Mapping[str, Any], key: str, role_key: str, text_key: str) -> list[Message]:
    messages = []
    for number, turn in enumerate(_listed(fields, key), 1):
        where = f"{key}, turn {number}"
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise RowError(f"{where}: expected an object with `{role_key}` and `{text_key}`")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise RowError(f"{where}: unknown role `{turn[role_key]}`; known: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise RowError(f"{where}: tool calls are not supported yet")
        messages.append(_message(role, _content(turn, text_key, where)))
    if not messages:
        raise RowError(f"`{key}` is empty")
    return messages


def _listed(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(f"`{key}` holds broken JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{key}` must be a list of turns")
    return list(value)


def _looks_like_turns(text: str) -> bool:
    return text.lstrip().startswith("[{") and '"role"' in text


def _text(fields: Mapping[str, Any], key: str) -> str:
    return _content(fields, key, f"`{key}`")


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    value = turn.get(key)
    if isinstance(value, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        value = "".join(str(part.get("text", "")) for part in value)  # OpenAI's list of parts
    if not isinstance(value, str):
        raise RowError(f"{where}: `{key}` must be text, not {'missing' if value is None else type(value).__name__}")
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
