"""Turns the usual forms of chat data into one kind of list of messages, and detects rows that are text or token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from phinetune.chats.template import Message
from phinetune.config.row_forms import READY, ROW_FORMS, expected_keys
from phinetune.data.read.safe_json import load_json
from phinetune.data.read.tool_calls import FUNCTION_CALL, read_calls, read_tools
from phinetune.errors import RowError

__all__ = ["READY", "ROLES", "RowError", "detect_form", "size_of", "strings", "to_messages"]

# The names that tools which write chat data use for roles, and the roles that they mean.
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
    FUNCTION_CALL: "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
KEYS_SHOWN = 12


def detect_form(fields: Mapping[str, Any]) -> str:
    """The name of the first form in `ROW_FORMS` that has a row's keys.

    Raises:
        RowError: no form has these keys.
    """
    form = next((form.name for form in ROW_FORMS if form.fits(fields)), None)
    if form:
        return form
    keys = ", ".join([*map(_shown, list(fields)[:KEYS_SHOWN]), *(["…"] if len(fields) > KEYS_SHOWN else [])])
    raise RowError(f"the keys ({keys or 'none'}) are those of no known form; expected {expected_keys()}")


def to_messages(fields: Mapping[str, Any], form: str = "auto") -> list[Message]:
    """The row's chat as messages with `role` (system, user, assistant, tool) and `content`.

    The row's tools become the key `tools` of its system message. If there is no system message, an empty one is added.

    Raises:
        RowError: the row is not of this form, has no assistant turn, or begins with one.
    """
    messages = MESSAGES_OF[detect_form(fields) if form == "auto" else form](fields)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to learn from it", "roles")
    if messages[0]["role"] == "assistant":
        raise RowError("the first turn is the assistant's; a chat starts with a user or system turn", "roles")
    tools = read_tools(fields)
    if tools:
        if messages[0]["role"] != "system":
            messages.insert(0, _message("system", ""))
        messages[0] = {**messages[0], "tools": tools}
    for message in messages:
        check_letters(message["content"])
        if "tools" in message or "tool_calls" in message:
            check_letters(json.dumps(message, ensure_ascii=False))
    return messages


def check_letters(text: str) -> None:
    """Make sure that a text can be encoded at all.

    Raises:
        RowError: the text holds half a character (`"\\ud83d"` in a JSON file), which no tokenizer accepts.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise RowError("the text holds half a character (a lone surrogate such as \\ud83d)", "letters") from None


def strings(value: Any) -> Iterator[str]:
    """Every text inside a row, in order. Keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def size_of(value: Any) -> int:
    """The size of a row: the number of its letters, those of keys too, plus the number of its values."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += sum(map(len, map(str, item)))
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            if all(type(one) is int for one in item):
                total += len(item)
            else:
                waiting.extend(item)
    return total


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


# The function that turns a row of each form into messages. Rows of the forms `READY` never become messages.
MESSAGES_OF: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _system(fields: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _text(fields, "system"))] if fields.get("system") else []


def _turns(fields: Mapping[str, Any], key: str, role_key: str, text_key: str) -> list[Message]:
    turns = enumerate(_listed(fields, key), 1)
    messages = [_turn(turn, role_key, text_key, f"{key}, turn {number}") for number, turn in turns]
    if not messages:
        raise RowError(f"`{key}` is empty")
    return messages


def _turn(turn: Any, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn:
        raise RowError(f"{where}: expected an object with `{role_key}` and `{text_key}`")
    name = str(turn[role_key]).lower()
    role = ROLES.get(name)
    if role is None:
        raise RowError(f"{where}: unknown role `{_shown(turn[role_key])}`; known: {', '.join(ROLES)}", "roles")
    calls = read_calls(turn, name, turn.get(text_key), where)
    if calls and role != "assistant":
        raise RowError(f"{where}: only an assistant's turn can call tools, not a {role} turn", "tools")
    written = name != FUNCTION_CALL and not (calls and turn.get(text_key) is None)
    message = _message(role, _content(turn, text_key, where) if written else "")
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message.update({key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)})
    if not _is_trained(turn, where):
        message["train"] = False
    return message


def _is_trained(turn: Mapping[str, Any], where: str) -> bool:
    """Whether a turn is trained on. `train: false`, or OpenAI's `weight: 0`, leaves it out of the loss."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where}: `train` must be true or false")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"{where}: `weight` must be 0 or 1; for more of a file, give it a weight in data.train")
    return train is not False and weight != 0


def _listed(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields.get(key)
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = load_json(value)
        except ValueError as error:
            raise RowError(f"`{key}` holds broken JSON: {error}") from None
    if value is None:
        raise RowError(f"`{key}` is missing", "content")
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{key}` must be a list of turns")
    return list(value)


def _looks_like_turns(text: str) -> bool:
    return text.lstrip().startswith("[{") and '"role"' in text


def _text(fields: Mapping[str, Any], key: str) -> str:
    return _content(fields, key, f"`{key}`")


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    value = turn.get(key)
    if isinstance(value, list) and all(map(_is_text_part, value)):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        given = "missing" if value is None else type(value).__name__
        raise RowError(f"{where}: `{key}` must be text, not {given}", "content")
    return value


def _is_text_part(part: Any) -> bool:
    """Whether this is a text part. OpenAI's `content` may be a list of parts."""
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _shown(value: Any) -> str:
    """A value of the row for an error message: short, and without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
