"""Finds what of a row never reaches the model, and what in its tool calls storage may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from phinetune.chats.control import ControlTokens
from phinetune.chats.template import Message
from phinetune.config.row_forms import CHAT_KEYS, JUDGED_FORMS, PAIR_FORMS, READY, ROW_FORMS
from phinetune.data.read.messages import READ_OF_TURN, ROLES, looks_like_turns, more_texts, shown, strings, turn_keys
from phinetune.data.read.tool_calls import ARGUMENTS, FUNCTION_CALL, READ_OF_CALL, from_json, is_filled
from phinetune.errors import RowError

READ_OF = {form.name: form.read for form in (*ROW_FORMS, *PAIR_FORMS, *JUDGED_FORMS)}
PLAIN = ({"role", "content"}, {"from", "value"})  # the keys of a turn with nothing beside its role and its text
LINKS = frozenset({"tool_call_id"})  # they only say which call an answer belongs to
NULLS, FLOATS, RENDERED = "nulls", "floats", "rendered"


@dataclass
class Audit:
    """What was found in one row.

    Attributes:
        unused: columns and keys of turns that reach no model, each with whether it holds words.
        notes: `NULLS` if nulls were left out of tools or calls, `FLOATS` if these hold numbers such as 2.0, `RENDERED`
            if a question is rendered already.
    """

    unused: dict[str, bool] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)

    def in_order(self) -> list[str]:
        """What is not used, words first."""
        return sorted(self.unused, key=lambda name: not self.unused[name])

    def add(self, name: str, value: Any) -> None:
        """Note a value that is not used. One that is empty loses nothing."""
        name = shown(name) or "(no name)"
        words = any(text.strip() for text in strings(value))
        if words or is_filled(value):
            self.unused[name] = self.unused.get(name, False) or words


def audit_row(
    fields: Mapping[str, Any],
    form: str,
    reads: Callable[[str, str], bool] = lambda role, key: False,
    taken: Sequence[str] = (),
) -> Audit:
    """What of a row never reaches the model.

    Args:
        form: the row's form. The row has been read as one of this form without an error.
        reads: whether the checkpoint's template writes what the turns of a role have in a key.
        taken: columns that something else uses.
    """
    made = Audit()
    for key, value in fields.items():
        if key not in READ_OF[form]:
            if key not in taken:
                made.add(key, value)
        elif form not in READY:
            _audit_value(key, value, reads, made)
    return made


def is_rendered(message: Message, control: ControlTokens) -> bool:
    """Whether a question begins and ends with control tokens, as one does that a template has rendered."""
    if message["role"] == "assistant":
        return False
    found, text = control.find(message["content"]), message["content"].strip()
    return len(found) > 1 and text.startswith(found[0]) and text.endswith(found[-1])


def _audit_value(key: str, value: Any, reads: Callable[[str, str], bool], made: Audit) -> None:
    """Look into a column that is read: its turns, its tools, the parts of its text."""
    items = [] if isinstance(value, str) and not _holds_turns(key, value) else _items(value)
    if key == "system":
        _audit_parts(key, items, made)
    elif key in CHAT_KEYS:
        _audit_tools(items, made)
    elif items and key != "completions":  # of UltraFeedback: answers with many notes, not turns
        either = key.startswith("conversation") or key in ("chosen", "rejected")
        names = turn_keys(items) if either else ("role", "content")
        for turn in items:
            if turn.keys() not in PLAIN or not isinstance(turn.get(names[1]), str) or _is_call(turn, names):
                _audit_turn(turn, names, reads, made)


def _holds_turns(key: str, text: str) -> bool:
    """Whether the text of a column is JSON that is read as such. In other columns, JSON is a text like any other."""
    if key in ("prompt", "completion", "chosen", "rejected"):
        return looks_like_turns(text)
    return key == "messages" or key.startswith("conversation") or (key in CHAT_KEYS and key != "system")


def _items(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list, or the only one of a JSON text; empty if it is neither."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = from_json(value, "")
        except RowError:
            return []
        value = [value] if isinstance(value, Mapping) else value
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def _audit_turn(
    turn: Mapping[str, Any], names: tuple[str, str], reads: Callable[[str, str], bool], made: Audit
) -> None:
    role = ROLES.get(str(turn.get(names[0])).lower(), "")
    more = more_texts(turn, *names)
    for key, value in turn.items():
        used = key in names or key in READ_OF_TURN or key in LINKS or (key == "tools" and role == "system")
        if not used and not (key in more and reads(role, key)):
            made.add(f"turns[].{key}", value)
    text = turn.get(names[1])
    if not isinstance(text, str):
        _audit_parts(f"turns[].{names[1]}", _items(text), made)
    _audit_tools(_items(turn.get("tools")), made)
    for key in ("tool_calls", FUNCTION_CALL, *([names[1]] if _is_call(turn, names) else [])):
        calls = turn.get(key)
        for call in _items([calls] if isinstance(calls, Mapping) else calls):
            _audit_call(call, isinstance(calls, str), made)


def _is_call(turn: Mapping[str, Any], names: tuple[str, str]) -> bool:
    """Whether the text of a turn is a call."""
    return str(turn.get(names[0])).lower() == FUNCTION_CALL


def _audit_parts(name: str, parts: Sequence[Mapping[str, Any]], made: Audit) -> None:
    for part in parts:
        _add_others(f"{name}[]", part, {"type", "text"}, made)


def _audit_tools(tools: Sequence[Mapping[str, Any]], made: Audit) -> None:
    for tool in tools:
        if isinstance(tool.get("function"), Mapping):
            _add_others("tools[]", tool, {"type", "function"}, made)
        _note(tool.get("function") or tool, made)


def _audit_call(call: Mapping[str, Any], was_text: bool, made: Audit) -> None:
    """Look at a call. Nulls and numbers in JSON text are the user's own; storage changes no text."""
    function = call.get("function") or call
    _add_others("turns[].tool_calls[]", call, READ_OF_CALL if function is call else READ_OF_CALL - {"name"}, made)
    if function is not call:
        _add_others("turns[].tool_calls[].function", function, {"name", *ARGUMENTS}, made)
    if not was_text:
        _note([function.get(key) for key in ARGUMENTS], made)


def _add_others(name: str, item: Mapping[str, Any], read: Set[str], made: Audit) -> None:
    """Note what an object has beside the keys that are read, in its own order."""
    for key, value in item.items():
        if key not in read:
            made.add(f"{name}.{key}", value)


def _note(value: Any, made: Audit) -> None:
    for item in _values(value):
        if item is None:
            made.notes.add(NULLS)
        elif isinstance(item, float) and item.is_integer():
            made.notes.add(FLOATS)


def _values(value: Any) -> Iterator[Any]:
    """All values in the objects and lists of a value that are neither; a null only as the value of a key."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from [None] if item is None else _values(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _values(item)
    elif value is not None:
        yield value
