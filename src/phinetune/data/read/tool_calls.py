"""Reads the tools and tool calls of a row, and gives them the form that chat templates expect.

Rows have them in OpenAI's form or in ShareGPT's. A call becomes `{"type": "function", "function": {"name": …,
"arguments": {…}}}`, with its arguments as an object. A tool becomes `{"type": "function", "function": {"name": …,
"description": …, "parameters": {…}}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phinetune.data.read.safe_json import load_json
from phinetune.errors import RowError

FUNCTION_CALL = "function_call"  # ShareGPT's role, and the key of OpenAI's older form


def read_tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools of a row: its `tools`, or its `functions` as in OpenAI's older form.

    Raises:
        RowError: they are not a list of tools with names, nor JSON text of such a list.
    """
    key = "tools" if fields.get("tools") else "functions"
    value = _from_json(fields.get(key), f"`{key}`")
    if not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise RowError(f"`{key}` must be a list of tools, or such a list as JSON text", "tools")
    return [_tool(tool, f"`{key}`, tool {number}") for number, tool in enumerate(value, 1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where}: expected an object with `name`, `description` and `parameters`", "tools")
    return {"type": "function", "function": dict(function)}


def read_calls(turn: Mapping[str, Any], role: str, text: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn. Empty if there are none.

    Args:
        role: the turn's role, as in the row.
        text: the turn's text. It holds the call if the role is `function_call`.
        where: the place of the turn, for messages.

    Raises:
        RowError: a call has no name, or its arguments are not a JSON object.
    """
    if role == FUNCTION_CALL:
        value = _from_json(text, where)
        calls = value if isinstance(value, list) else [value]
    elif turn.get(FUNCTION_CALL):
        calls = [turn[FUNCTION_CALL]]
    else:
        calls = _from_json(turn.get("tool_calls"), f"{where}: `tool_calls`") or []
        if not isinstance(calls, (list, tuple)):
            raise RowError(f"{where}: `tool_calls` must be a list", "tools")
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where}: a tool call needs a `name` and `arguments`", "tools")
    arguments = _from_json(function.get("arguments"), f"{where}: the arguments of `{function['name']}`")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{where}: the arguments of `{function['name']}` must be an object", "tools")
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if isinstance(call.get("id"), str):
        made["id"] = call["id"]
    return made


def _from_json(value: Any, where: str) -> Any:
    """The value of a JSON text. A value that is not text is returned as it is; an empty text gives None."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return load_json(value)
    except ValueError as error:
        raise RowError(f"{where}: broken JSON: {error}", "tools") from None
