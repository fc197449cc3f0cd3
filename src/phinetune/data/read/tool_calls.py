"""Reads the tools and tool calls of a row, and gives them the form that chat templates expect.

Rows have them in OpenAI's form or in ShareGPT's. A call becomes `{"type": "function", "function": {"name": …,
"arguments": {…}}}`, with its arguments as an object. A tool becomes `{"type": "function", "function": {"name": …,
"description": …, "parameters": {…}}}`.

Parquet and Arrow give all objects of a column the same keys, and fill those that an object lacks with null. So null and
absent can't be told apart there, and one rule holds for all sources: nulls in objects are left out of tools and of
calls. Storage changes no text, so a call that stands in the row as JSON text, or has its arguments as JSON text, stays
as it is. The order of keys is also the storage's, except in JSON text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phinetune.data.read.safe_json import load_json
from phinetune.errors import RowError

FUNCTION_CALL = "function_call"  # ShareGPT's role, and the key of OpenAI's older form
ARGUMENTS = ("arguments", "parameters", "args", "input")  # OpenAI's key, Llama 3's, LangChain's and Anthropic's
READ_OF_CALL = frozenset({"function", "id", "type", "name", *ARGUMENTS})
NO_ARGUMENTS = READ_OF_CALL | {"index"}  # keys that can't hold a call's arguments under another name


def read_tools(fields: Mapping[str, Any], where: str = "") -> list[dict[str, Any]]:
    """The tools of a row or of a system turn: its `tools`, or its `functions` as in OpenAI's older form.

    Args:
        where: the place of the turn, for messages.

    Raises:
        RowError: they are not a list of tools with names, nor JSON text of such a list; or both keys have some.
    """
    if fields.get("tools") and fields.get("functions"):
        raise RowError("the row has both `tools` and `functions`; keep one of them", "tools")
    key = "tools" if fields.get("tools") else "functions"
    place = f"{where}: `{key}`" if where else f"`{key}`"
    value = from_json(fields.get(key), place)
    if not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{place} must be a list of tools, or such a list as JSON text", "tools")
    return [_tool(tool, f"{place}, tool {number}") for number, tool in enumerate(value, 1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") or tool if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where}: expected an object with `name`, `description` and `parameters`", "tools")
    return {"type": "function", "function": without_nulls(function, where)}


def read_calls(turn: Mapping[str, Any], role: str, text: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn. Empty if there are none.

    Args:
        role: the turn's role, as in the row.
        text: the turn's text. It holds the call if the role is `function_call`.
        where: the place of the turn, for messages.

    Raises:
        RowError: a call has no name, its arguments are not a JSON object, or the turn has calls in two places.
    """
    given = [key for key in (FUNCTION_CALL, "tool_calls") if turn.get(key)]
    if role == FUNCTION_CALL and not given:
        value = from_json(text, where)
        return [_call(call, where, isinstance(text, str)) for call in (value if isinstance(value, list) else [value])]
    if not given:
        return []
    if len(given) > 1 or role == FUNCTION_CALL:
        raise RowError(f"{where}: the turn has calls in two places; keep one of them", "tools")
    value = turn[given[0]]
    calls = from_json(value, f"{where}: `{given[0]}`") or []
    calls = [calls] if given[0] == FUNCTION_CALL else calls
    if not isinstance(calls, (list, tuple)):
        raise RowError(f"{where}: `tool_calls` must be a list", "tools")
    return [_call(call, where, isinstance(value, str)) for call in calls]


def _call(call: Any, where: str, was_text: bool) -> dict[str, Any]:
    """A call in the form that templates expect.

    Args:
        was_text: whether it stood in the row as JSON text.
    """
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where}: a tool call needs a `name` and `arguments`", "tools")
    places = [function] if function is call else [function, call]
    arguments = _arguments(places, f"{where}: the arguments of `{function['name']}`", was_text)
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def _arguments(places: Sequence[Mapping[str, Any]], where: str, was_text: bool) -> dict[str, Any]:
    """The arguments of a call, under whichever of `ARGUMENTS` they stand.

    Args:
        places: the objects that may hold them.

    Raises:
        RowError: there are two different ones, or there are none and a key that is not read holds something.
    """
    keys = [(place, key) for place in places for key in ARGUMENTS if place.get(key) not in (None, "")]
    found = [_object(place[key], where, was_text) for place, key in keys]
    if any(other != found[0] for other in found):
        names = "`, `".join(key for _, key in keys)
        raise RowError(f"{where} stand in two places and differ (`{names}`); keep one of them", "tools")
    others = [key for place in places for key in place if key not in NO_ARGUMENTS and is_filled(place[key])]
    if others and not found:
        raise RowError(f"{where} are missing, and `{'`, `'.join(others)}` is not read; name them `arguments`", "tools")
    return found[0] if found else {}


def _object(given: Any, where: str, was_text: bool) -> dict[str, Any]:
    """Arguments as an object, also those that stand there as JSON text."""
    value = from_json(given, where)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RowError(f"{where} must be an object", "tools")
    return dict(value if was_text or isinstance(given, str) else without_nulls(value, where))


def is_filled(value: Any) -> bool:
    """Whether a value holds anything but nulls, empty texts and empty lists."""
    if isinstance(value, Mapping):
        return any(map(is_filled, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(is_filled, value))
    return value is not None and value != ""


def without_nulls(value: Any, where: str) -> Any:
    """The value without the nulls of its objects, however deep they lie.

    Raises:
        RowError: it holds something that JSON does not have, such as a date of a Parquet file.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item, where) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item, where) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise RowError(f"{where}: a {type(value).__name__} can't stand in JSON; write it as text", "tools")


def from_json(value: Any, where: str) -> Any:
    """The value of a JSON text. A value that is not text is returned as it is; an empty text gives None."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return load_json(value)
    except ValueError as error:
        raise RowError(f"{where}: broken JSON: {error}", "tools") from None
