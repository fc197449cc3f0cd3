"""Templates with fields in braces, as `data.prompt` has them: `Translate to {lang}:\\n{text}`.

A field is the name of a column and nothing else: no expression, no format, no condition. So a template can't run code,
it loses no white space, and it says before the first row which columns it needs. That is why these are format fields
and not Jinja; what needs a condition is a Python function (`data.row`). A brace that is meant is written twice.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Piece(NamedTuple):
    """A text, and the field that follows it; None at the end."""

    text: str
    field: str | None


@functools.cache
def parse_template(template: str) -> tuple[Piece, ...]:
    """The pieces of a template, in order.

    Raises:
        ValueError: a brace stands alone, or a field has no name.
    """
    pieces, text, end = [], "", 0
    for found in _PART.finditer(template):
        text, end = text + template[end : found.start()], found.end()
        if found[0] in ("{{", "}}"):
            text += found[0][0]
        elif found[1] is None:
            raise ValueError(f"a `{found[0]}` stands alone at character {found.start() + 1}; write it twice if meant")
        elif not found[1].strip():
            raise ValueError("`{}` names no column; write {name}, or {{}} for the braces themselves")
        else:
            pieces.append(Piece(text, found[1].strip()))
            text = ""
    return (*pieces, Piece(text + template[end:], None))


def fields_of(template: str) -> list[str]:
    """The columns that a template names, each once, in order."""
    return list(dict.fromkeys(piece.field for piece in parse_template(template) if piece.field is not None))
