"""Reads JSON text, and says in words what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100  # levels of nesting; templates and writers fail at some hundreds, as they are recursive
TOO_DEEP = "nested too deeply"


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or its value is nested too deeply to be used.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        more = "; one value was expected, and more follows" if error.msg == "Extra data" else ""
        raise ValueError(f"{error.msg} (column {error.colno}){more}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list, tuple))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
