"""From the columns that a person has to a row of a known form: `data.columns`, templates, or a Python function.

A value that is no text is written as `plain_values.as_text` says. A column that is null or missing in a row counts as
empty. A question or an answer that is empty as a whole is refused; within a template, an empty column leaves a gap, and
the report counts such rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phinetune.chats.template import Message
from phinetune.config.data import DataSection
from phinetune.config.format_fields import Piece, parse_template
from phinetune.data.read.held_data import function_title, held_function
from phinetune.data.read.plain_values import as_text, plain
from phinetune.errors import RowError, reason_of

GAP, OWN_SYSTEM, NO_SYSTEM = "gap", "own_system", "no_system"  # notes beside those of `plain_values`
QUESTION, ANSWER = "user", "assistant"


class LeftOut(RowError):
    """The row's function gave None: the row is left out, and nothing is wrong with it."""


class Source(NamedTuple):
    """Where a text comes from: a template of columns, and the knob that has it."""

    pieces: tuple[Piece, ...]
    knob: str

    @property
    def columns(self) -> list[str]:
        return [piece.field for piece in self.pieces if piece.field is not None]


@dataclass
class MappedRow:
    """A row of a known form.

    Attributes:
        fields: what it has now; columns that the mapping has used are gone.
        hidden: columns that nothing uses because the mapping made another value of the same key.
        notes: what became of values that are no text.
        system: the system message for a row that has none of its own.
    """

    fields: Mapping[str, Any]
    hidden: dict[str, Any] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    system: str = ""

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages behind the system message that all rows get; a row's own stays as it is."""
        if not self.system:
            return messages
        first = messages[0]
        if first["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        if first["content"].strip():
            self.notes.add(OWN_SYSTEM)
            return messages
        return [{**first, "content": self.system}, *messages[1:]]


@dataclass(frozen=True)
class RowMapping:
    """What `data` says of the columns.

    Attributes:
        texts: what makes the question, the answer and the system message.
        renamed: keys of a form, and the column that each is taken from as it is.
        system: what makes the system message of rows that have none.
        function: makes the whole row.
    """

    texts: Mapping[str, Source]
    renamed: Mapping[str, str]
    system: Source | None
    function: Callable[..., Any] | None

    @classmethod
    def of(cls, section: DataSection) -> RowMapping | None:
        """The mapping of a section; None if rows are taken as they are.

        Raises:
            DataError: no program holds the function now.
        """
        texts = {
            role: Source((Piece("", section.columns[role]), Piece("", None)), f"data.columns: {role}")
            for role in (QUESTION, ANSWER, "system")
            if role in section.columns
        }
        for role, knob in ((QUESTION, "prompt"), (ANSWER, "completion")):
            template = getattr(section, knob)
            if template is not None:
                texts[role] = Source(parse_template(template), f"data.{knob}")
        renamed = {key: column for key, column in section.columns.items() if key not in texts}
        text = section.system_text
        system = Source(parse_template(text), "data.system_text") if text is not None else None
        function = held_function(section.row) if section.row else None
        return cls(texts, renamed, system, function) if texts or renamed or system or function else None

    def needed(self) -> Iterator[tuple[str, str]]:
        """Each column that is named, and the knob that names it."""
        for source in (*self.texts.values(), *([self.system] if self.system else [])):
            yield from ((column, source.knob) for column in source.columns)
        yield from ((column, f"data.columns: {key}") for key, column in self.renamed.items())

    def __call__(self, fields: Mapping[str, Any]) -> MappedRow:
        """The row as the mapping makes it.

        Raises:
            RowError: a question or an answer is empty, a value can't be written, or the function failed.
        """
        made = MappedRow(_called(self.function, fields)) if self.function else self._by_columns(fields)
        if self.system:
            made.system = _text(self.system, fields, made.notes)
        return made

    def _by_columns(self, fields: Mapping[str, Any]) -> MappedRow:
        notes: set[str] = set()
        texts = {role: _text(source, fields, notes) for role, source in self.texts.items()}
        for role in (QUESTION, ANSWER):
            if role in texts and not any(_is_filled(fields, column) for column in self.texts[role].columns):
                _refuse_empty(self.texts[role], texts[role])
        produced = {key: value_at(fields, column) for key, column in self.renamed.items()}
        produced |= _as_form(texts)
        used = {root for column, _ in self.needed() if (root := root_of(fields, column)) is not None}
        rest = {key: value for key, value in fields.items() if key not in used}
        hidden = {key: rest.pop(key) for key in produced if key in rest}
        return MappedRow({**produced, **rest}, hidden, notes)


def _as_form(texts: Mapping[str, str]) -> dict[str, Any]:
    """Question and answer as turns, so that a text is never taken for anything else; one alone under its key."""
    made: dict[str, Any] = {}
    if QUESTION in texts and ANSWER in texts:
        made["messages"] = [{"role": role, "content": texts[role]} for role in (QUESTION, ANSWER)]
    elif QUESTION in texts:
        made["prompt"] = texts[QUESTION]
    elif ANSWER in texts:
        made["completion"] = texts[ANSWER]
    if texts.get("system", "").strip():
        made["system"] = texts["system"]
    return made


def _text(source: Source, fields: Mapping[str, Any], notes: set[str]) -> str:
    parts: list[str] = []
    for text, column in source.pieces:
        parts.append(text)
        if column is None:
            continue
        try:
            value, note = as_text(value_at(fields, column))
        except ValueError as error:
            raise RowError(f"`{column}` ({source.knob}) {error}", "content") from None
        if note:
            notes.add(note)
        if not value.strip() and len(source.pieces) > 2:
            notes.add(GAP)
        parts.append(value)
    return "".join(parts)


def _refuse_empty(source: Source, text: str) -> None:
    """Refuse a question or an answer without a filled column; a template without any column says what it says."""
    if not source.columns and text.strip():
        return
    names = ", ".join(f"`{column}`" for column in dict.fromkeys(source.columns))
    verb = "is" if len(set(source.columns)) == 1 else "are all"
    raise RowError(f"{names or 'the text'} ({source.knob}) {verb} empty, and the row needs its text", "content")


def _is_filled(fields: Mapping[str, Any], column: str) -> bool:
    value = value_at(fields, column)
    return bool(value.strip()) if isinstance(value, str) else value is not None and value == value


def root_of(fields: Mapping[str, Any], column: str) -> str | None:
    """The key of the row that a column is found under; None if the row has no such key."""
    if column in fields:
        return column
    root = column.split(".")[0]
    return root if root in fields else None


def value_at(fields: Mapping[str, Any], column: str) -> Any:
    """The value of a column; `a.b` is the key b, or the item at place b, inside the column a. None if it is absent."""
    if column in fields:
        return fields[column]
    value: Any = fields
    for part in column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _called(function: Callable[..., Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the user's function makes of a row, as a row of a known form."""
    name = function_title(function)
    try:
        made = function(dict(fields))
    except Exception as error:
        raise RowError(f"{name} (data.row) failed: {type(error).__name__}: {reason_of(error)}") from error
    if made is None:
        raise LeftOut(f"left out by {name} (data.row)")
    if isinstance(made, str):
        return {"text": made}
    if isinstance(made, (list, tuple)):
        return {"messages": plain(made)}
    if not isinstance(made, Mapping):
        raise RowError(
            f"{name} (data.row) returned {type(made).__name__}; return a dict of a known form, a list of messages, a "
            "text, or None to leave the row out"
        )
    row: dict[str, Any] = plain(made)
    return row
