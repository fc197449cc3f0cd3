"""Makes a chat's token ids of the messages of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.chats.template import Message
from phinetune.data.read.tool_calls import read_calls, read_tools
from phinetune.errors import RowError
from phinetune.serving.answers.answerer import Answerer
from phinetune.serving.errors import ApiError, unknown_parameter

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# What the API has in a message: of answers, too, which clients send back as they got them. The second line of keys
# changes no answer here.
MESSAGE_KEYS = {
    *("role", "content", "name", "tool_calls", "function_call", "tool_call_id", "refusal", "type"),
    *("annotations", "audio", "id", "phase", "status"),
}
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def chat_ids(answerer: Answerer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
    """The token ids of a prompt.

    Args:
        tools: as the API has them.

    Raises:
        ApiError: the model's template can't render it, or drops part of it.
    """
    try:
        chat = _joined_systems(list(messages))
        if tools:
            known = read_tools({"tools": list(tools)})
            head = chat.pop(0) if chat and chat[0]["role"] == "system" else {"role": "system", "content": ""}
            chat.insert(0, {**head, "tools": known})
        return answerer.encoder.prompt_ids(answerer.encoder.prepare(chat))
    except RowError as error:
        param = "tools" if error.kind == "tools" else "messages"
        raise ApiError(400, str(error), code="invalid_value", param=param) from None
    except Exception as error:  # Jinja and a template's author can raise errors of any class
        text = " ".join(str(error).split())[:300]
        raise ApiError(
            400, f"The model's chat template refuses these messages: {text}", code="invalid_value", param="messages"
        ) from None


def _joined_systems(chat: list[Message]) -> list[Message]:
    """The chat with the system messages at its beginning made one: clients send a system and a developer message."""
    count = next((i for i, message in enumerate(chat) if message["role"] != "system"), len(chat))
    if count < 2:
        return chat
    text = "\n\n".join(message["content"] for message in chat[:count])
    return [{"role": "system", "content": text}, *chat[count:]]


def read_messages(given: Sequence[Mapping[str, Any]], param: str = "messages") -> list[Message]:
    """The messages of a request, as chats have them here.

    Raises:
        ApiError: one has no known role, no text, something other than text, or a key that the API does not have.
    """
    return [_message(message, f"{param}[{i}]") for i, message in enumerate(given)]


def _message(given: Mapping[str, Any], where: str) -> Message:
    unknown = [key for key, value in given.items() if key not in MESSAGE_KEYS and value is not None]
    if unknown:
        raise unknown_parameter(f"{where}.{unknown[0]}")
    role = ROLES.get(given["role"]) if isinstance(given.get("role"), str) else None
    if role is None:
        names = ", ".join(f"'{name}'" for name in ROLES)
        raise ApiError(
            400, f"Invalid value: {given.get('role')!r}. Supported values are: {names}.", "invalid_request_error",
            "invalid_value", f"{where}.role",
        )  # fmt: skip
    content = given.get("content")
    if content is None and not (role == "assistant" and given.get("tool_calls")):
        raise ApiError(
            400, f"'{where}.content' is missing: expected text or a list of parts.", code="invalid_value",
            param=f"{where}.content",
        )  # fmt: skip
    made: Message = {"role": role, "content": _text(content, f"{where}.content")}
    try:
        calls = read_calls(given, role, made["content"], where) if role == "assistant" else []
    except RowError as error:
        raise ApiError(400, str(error), code="invalid_value", param=f"{where}.tool_calls") from None
    if calls:
        made["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if isinstance(given.get(key), str):
            made[key] = given[key]
    return made


def _text(content: Any, where: str) -> str:
    """The text of a message's content, of all its parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"'{where}' is neither text nor a list of parts.", code="invalid_type", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            raise ApiError(
                400, f"'{where}[{i}]' is of type {json.dumps(kind)}: this model reads text alone.",
                code="invalid_value", param=f"{where}[{i}]",
            )  # fmt: skip
        texts.append(text)
    return "".join(texts)
