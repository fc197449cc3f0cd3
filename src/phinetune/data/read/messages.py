"""Turns the usual forms of chat data into one kind of list of messages, and detects rows that are text or token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from phinetune.chats.template import Message
from phinetune.chats.template_rendering import REASONING
from phinetune.config.row_forms import READY, ROW_FORMS, RowForm, expected_keys
from phinetune.data.read.propose import propose
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
TEXT_PARTS = ("text", "input_text", "output_text", None)  # types of the parts of a `content`; Bedrock's have no type
READ_OF_TURN = frozenset({"tool_calls", FUNCTION_CALL, "train", "weight"})  # beside the keys of its role and its text
_OWN = frozenset({"role", "content", "tools"})  # keys of a `Message` that no other key of a turn may replace
_SAID = ("content", "tool_calls", FUNCTION_CALL, "refusal")  # keys by which an object with a `role` is a turn
_ROLE = re.compile(r"""(["'])role\1\s*:""")
_TURNS = re.compile(rf"""\s*\[?\s*\{{\s*(["'])(?:role|name|train|weight|{"|".join((*_SAID, *REASONING))})\1\s*:""")


def detect_form(fields: Mapping[str, Any], forms: Sequence[RowForm] = ROW_FORMS) -> str:
    """The name of the first of some forms that has a row's keys.

    Keys with a value come first: tables have all columns in every row, and leave empty those that a row does not use.

    Raises:
        RowError: no form has these keys.
    """
    filled = [key for key, value in fields.items() if value is not None and not (isinstance(value, str) and not value)]
    form = next((form.name for keys in (filled, fields) for form in forms if form.fits(keys)), None)
    if form:
        return form
    if forms is ROW_FORMS and {"chosen", "rejected"} <= fields.keys():
        raise RowError(
            "`chosen` and `rejected` are for objectives that learn from preferences: set objective to dpo, orpo, simpo "
            "or kto; to train on the chosen answers, name the columns `prompt` and `completion`"
        )
    keys = ", ".join([*map(shown, list(fields)[:KEYS_SHOWN]), *(["…"] if len(fields) > KEYS_SHOWN else [])])
    offer = _offer(fields) if forms is ROW_FORMS else ""
    raise RowError(f"the keys ({keys or 'none'}) are those of no known form; expected {expected_keys(forms)}{offer}")


def _offer(fields: Mapping[str, Any]) -> str:
    """The line that would read such a row, as the end of a sentence."""
    line = propose([fields]).line()
    return f"; or below `data:` write `{line}`" if line else ""


def to_messages(fields: Mapping[str, Any], form: str = "auto") -> list[Message]:
    """The row's chat as messages with `role` (system, user, assistant, tool) and `content`.

    The row's key `system` becomes its first message. The row's tools become the key `tools` of its system message. If
    there is no system message, an empty one is added. Further texts of a turn (its `name`, its `reasoning_content`)
    are kept under their keys: some templates write them.

    Raises:
        RowError: the row is not of this form, has no assistant turn, begins with one, or says something twice and
            differently.
    """
    return completed(fields, MESSAGES_OF[detect_form(fields) if form == "auto" else form](fields))


def completed(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The turns of a row as its chat: with the row's system text and its tools.

    Raises:
        RowError: see `to_messages`.
    """
    messages = _with_system(fields, messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to learn from it", "roles")
    if messages[0]["role"] == "assistant":
        raise RowError("the first turn is the assistant's; a chat starts with a user or system turn", "roles")
    tools = read_tools(fields)
    if tools:
        if messages[0]["role"] != "system":
            messages.insert(0, _message("system", ""))
        if messages[0].get("tools", tools) != tools:
            raise RowError("the row and its system turn have different `tools`; keep one of them", "tools")
        messages[0] = {**messages[0], "tools": tools}
    for message in messages:
        check_letters(message["content"])
        if message.keys() - {"role", "content", "train"}:
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
    return read_turns(fields, "messages", "role", "content")


def _from_conversations(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("conversations") and fields.get("conversation"):
        raise RowError("the row has both `conversations` and `conversation`; keep one of them")
    key = next((key for key in ("conversations", "conversation") if fields.get(key) is not None), "conversations")
    return read_turns(fields, key, *turn_keys(_listed(fields, key)))


def turn_keys(turns: Sequence[Any]) -> tuple[str, str]:
    """The keys under which the turns of `conversations` have their role and their text."""
    return (
        ("from", "value") if turns and isinstance(turns[0], Mapping) and turns[0].get("from") else ("role", "content")
    )


def _from_alpaca(fields: Mapping[str, Any]) -> list[Message]:
    question = _text(fields, "instruction")
    extra = _text(fields, "input") if fields.get("input") is not None else ""
    if extra:
        question += "\n" + extra
    return [*_history(fields), _message("user", question), _message("assistant", _text(fields, "output"))]


def _history(fields: Mapping[str, Any]) -> Iterator[Message]:
    """The earlier turns of an Alpaca row, as LLaMA-Factory has them: a list of questions, each with its answer."""
    pairs = _listed(fields, "history") if fields.get("history") not in (None, "") else []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (list, tuple)) or [type(text) for text in pair] != [str, str]:
            raise RowError(f"`history`, exchange {number}: expected a list of a question and its answer", "content")
        yield from (_message("user", pair[0]), _message("assistant", pair[1]))


def _from_prompt_completion(fields: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(fields.get(key), str) and not looks_like_turns(fields[key]):
            messages.append(_message(role, fields[key]))
        else:
            messages += read_turns(fields, key, "role", "content")
    return messages


# The function that turns a row of each form into messages. Rows of the forms `READY` never become messages.
MESSAGES_OF: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _with_system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages behind the row's own system text. Anthropic, Bedrock, ShareGPT and Alpaca write it beside them."""
    text = _text(fields, "system") if fields.get("system") is not None else ""
    if not text:
        return messages
    if messages[0]["role"] != "system":
        return [_message("system", text), *messages]
    if messages[0]["content"] != text:
        raise RowError("`system` and the system turn say different things; keep one of them", "roles")
    return messages


def read_turns(fields: Mapping[str, Any], key: str, role_key: str, text_key: str) -> list[Message]:
    """The messages in a column that holds turns."""
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
        raise RowError(f"{where}: unknown role `{shown(turn[role_key])}`; known: {', '.join(ROLES)}", "roles")
    if turn.get("refusal") and turn.get(text_key) is None:
        raise RowError(f"{where}: `refusal` holds the text of the turn; write it as `{text_key}`", "content")
    calls = read_calls(turn, name, turn.get(text_key), where)
    if calls and role != "assistant":
        raise RowError(f"{where}: only an assistant's turn can call tools, not a {role} turn", "tools")
    written = name != FUNCTION_CALL and not (calls and turn.get(text_key) is None)
    message = _message(role, _content(turn, text_key, where) if written else "")
    if calls:
        message["tool_calls"] = calls
    if role == "system" and turn.get("tools"):  # Phi-4 mini's own form
        message["tools"] = read_tools(turn, where)
    message.update(more_texts(turn, role_key, text_key))
    if len({message[key] for key in REASONING if key in message}) > 1:
        raise RowError(f"{where}: {', '.join(REASONING)} say different things; keep one of them", "content")
    if not _is_trained(turn, where):
        message["train"] = False
    return message


def more_texts(turn: Mapping[str, Any], role_key: str, text_key: str) -> dict[str, str]:
    """The texts of a turn beside its role and its text, by key. Whether they are used is the template's choice."""
    return {
        key: value
        for key, value in turn.items()
        if isinstance(value, str)
        and key not in (role_key, text_key)
        and key not in READ_OF_TURN
        and key not in _OWN
        and value.strip()
    }


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
        value = [value] if isinstance(value, Mapping) else value
    if value is None:
        raise RowError(f"`{key}` is {'empty' if key in fields else 'missing'}", "content")
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{key}` must be a list of turns")
    return list(value)


def looks_like_turns(text: str) -> bool:
    """Whether a text is no text but turns, written as JSON or, by mistake, as Python writes them."""
    if text.lstrip()[:1] not in ("[", "{") or not _ROLE.search(text):
        return False
    try:
        value = load_json(text)
    except ValueError:
        return _TURNS.match(text) is not None
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], Mapping) and "role" in value[0]
    return isinstance(value, Mapping) and "role" in value and not value.keys().isdisjoint(_SAID)


def _text(fields: Mapping[str, Any], key: str) -> str:
    if key in fields and fields[key] is None:
        raise RowError(f"`{key}` is empty, and the row needs its text", "content")
    return _content(fields, key, f"`{key}`")


def _content(turn: Mapping[str, Any], key: str, where: str) -> str:
    value = turn.get(key)
    if isinstance(value, (list, tuple)):
        return "".join(_text_part(part, f"{where}: `{key}`") for part in value)
    if not isinstance(value, str):
        given = "missing" if value is None else type(value).__name__
        raise RowError(f"{where}: `{key}` must be text, not {given}", "content")
    return value


def _text_part(part: Any, where: str) -> str:
    """The text of one part of a `content`, which may be a list of parts with OpenAI, Anthropic and Bedrock."""
    if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    filled = [key for key, value in part.items() if value is not None] if isinstance(part, Mapping) else []
    kind = part.get("type") or ", ".join(map(str, filled)) if filled else type(part).__name__
    raise RowError(f"{where} holds a part of the kind `{shown(kind)}`; only text can be trained on", "content")


def shown(value: Any) -> str:
    """A value of the row for an error message: short, and without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
