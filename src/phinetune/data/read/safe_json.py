"""Reads JSON text, and says in words what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

DEEPEST = 100  # levels of nesting; templates and writers fail at some hundreds, as they are recursive
TOO_DEEP = "nested too deeply"


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, an object has a key twice, or the value is nested too deeply to be used.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        more = "; one value was expected, and more follows" if error.msg == "Extra data" else ""
        raise ValueError(f"{error.msg} (column {error.colno}){more}") from None
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def load_with_twins(text: str) -> tuple[Any, dict[int, tuple[dict[str, Any], str]]]:
    """The value of a JSON text, and its objects that have a key twice: the object and what is wrong, by the id.

    Raises:
        json.JSONDecodeError: the text is not JSON.
    """
    twins: dict[int, tuple[dict[str, Any], str]] = {}

    def note(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twins[id(made)] = (made, _key_twice(pairs))
        return made

    return json.loads(text, object_pairs_hook=note), twins


def _refuse_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. JSON readers keep the last value of a key without a word about the others."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(_key_twice(pairs))
    return made


def _key_twice(pairs: Sequence[tuple[str, Any]]) -> str:
    key = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return f"the key {json.dumps(key[:40])} stands twice in one object; keep one of them"


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_twins)  # made once: `json.loads` would make one for each text


def first_twin(value: Any, twins: dict[int, tuple[dict[str, Any], str]]) -> str | None:
    """What is wrong with the first object in a value that has a key twice; None if there is none.

    A value that stood under such a key and was dropped has no place in `value`; the object around it has.
    """
    if id(value) in twins:
        return twins[id(value)][1]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((problem for item in items if (problem := first_twin(item, twins))), None)


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
